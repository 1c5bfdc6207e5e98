"""What a network takes in time at widths it does not have yet: a table of its layers, and interpolation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nni_topo.disk import path_of, read_json, reading, write_json
from nni_topo.errors import DataError


@dataclass(frozen=True)
class LayerLatency:
    """Seconds of one layer over its widths.

    Attributes
    ----------
    entering : tuple of int
        Input channels, ascending; a single entry if they follow the output channels (depth-wise convolutions).
    leaving : tuple of int
        Output channels, ascending.
    seconds : tuple of tuple of float
        Shape ``(len(entering), len(leaving))``, at least 0.
    activation : float
        Elements that the layer puts out at full width, per batch: the weight with which its output channels count for
        what happens between layers.
    """

    entering: tuple[int, ...]
    leaving: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    activation: float

    def __post_init__(self) -> None:
        for name in ("entering", "leaving"):
            widths = getattr(self, name)
            if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1:
                raise DataError(f"widths must be ascending and at least 1, got {widths} ({name})")
        if len(self.seconds) != len(self.entering) or any(len(row) != len(self.leaving) for row in self.seconds):
            raise DataError(f"a layer needs {len(self.entering)} by {len(self.leaving)} seconds, got others (seconds)")
        if not all(math.isfinite(value) and value >= 0.0 for row in self.seconds for value in row):
            raise DataError("seconds must be finite and at least 0, got others (seconds)")

    def at(self, entering: int, leaving: int) -> float:
        """Interpolate linearly in both widths; beyond the table its nearest entry counts."""
        by_entering = [float(np.interp(leaving, self.leaving, row)) for row in self.seconds]
        return float(np.interp(entering, self.entering, by_entering))


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a network's layers over their widths, and of what happens between them.

    Parameters
    ----------
    layers : mapping of str to LayerLatency
        Convolutions and linear layers by name.
    rest : float, default=0.0
        Seconds of everything else at full width, at least 0; it shrinks with the elements that the layers put out.
    batch_size, threads : int, default=1
        What it was measured with; kept for the record.

    Examples
    --------
    >>> layer = LayerLatency((1, 8), (1, 8), ((0.0, 1.0), (1.0, 9.0)), activation=8.0)
    >>> LatencyTable({"0": layer})({"0": (8, 4)})
    4.428571428571429
    """

    layers: Mapping[str, LayerLatency]
    rest: float = 0.0
    batch_size: int = 1
    threads: int = 1

    def __call__(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Return the seconds of the network at given widths.

        Parameters
        ----------
        widths : mapping of str to (int, int)
            Input and output channels that are left, by layer; layers that aren't in the table cost nothing.

        Returns
        -------
        float
            Seconds per batch.
        """
        known = {name: pair for name, pair in widths.items() if name in self.layers}
        layers = sum(self.layers[name].at(*pair) for name, pair in known.items())
        whole = sum(self.layers[name].activation for name in known)
        left = sum(self.layers[n].activation * out / self.layers[n].leaving[-1] for n, (_, out) in known.items())
        return float(layers + self.rest * (left / whole if whole else 1.0))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_json(path_of(path), asdict(self), sort=False)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table from JSON.

        Raises
        ------
        DataError
            If the file is missing or holds no latency table.
        """
        path = Path(path)
        with reading(path, "a latency table"):
            content = read_json(path)
            layers = {
                name: LayerLatency(
                    tuple(layer["entering"]),
                    tuple(layer["leaving"]),
                    tuple(tuple(row) for row in layer["seconds"]),
                    float(layer["activation"]),
                )
                for name, layer in content.pop("layers").items()
            }
            return cls(layers, **content)
