"""Base classes of the command line's verbs, whose fields are flags, and of the studies and their findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from matplotlib.figure import Figure
from rich.console import Console, RenderableType
from tyro.constructors import PrimitiveConstructorSpec

from nni_topo.disk import check_free_disk, finite, output_folder, plain, write_figure, write_text
from nni_topo.runs.choices import DataChoice, ModelChoice
from nni_topo.runs.run import Start, trained
from nni_topo.studies.report import entries_of, write_report

if TYPE_CHECKING:
    import pandas

Tell = Callable[[str], None]
Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME,NAME",
        instance_from_str=lambda words: tuple(n.strip() for word in words for n in word.split(",") if n.strip()),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
        str_from_instance=lambda names: [",".join(names)],
    ),
]
"""Names after a flag, separated by commas or spaces."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb of ``nni-topo``. Its fields are its flags; ``--help`` shows the comment after each field.

    The first line of a subclass's docstring says what the verb does.
    """

    json: bool = False  # print one JSON document to standard output
    seed: int = 0  # seed of the run; the first seed if there are several
    device: str = "cpu"  # cpu, cuda, cuda:1, auto or another device of PyTorch

    def run(self, console: Console) -> int:
        """Run the verb and return the exit status; everything except JSON is printed to the console."""
        raise NotImplementedError

    def put_out(self, console: Console, document: Any, parts: Iterable[RenderableType]) -> None:
        """Print one JSON document with ``--json``, otherwise tables and lines."""
        if self.json:
            print(json.dumps(finite(document), indent=1))
            return
        for part in parts:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


@dataclass(frozen=True, kw_only=True)
class ModelVerb(Verb):
    """A verb for a model, given by name."""

    model: str  # a listed name, torchvision/NAME, timm/NAME, package.module:factory or file.py:factory
    width: float = 1.0  # factor on the layers' widths, above 0

    @property
    def model_choice(self) -> ModelChoice:
        """The model and its width."""
        return ModelChoice(self.model, self.width)


@dataclass(frozen=True, kw_only=True)
class DataVerb(ModelVerb):
    """A verb for a model and a data set."""

    data: str = "digits"  # a listed name, an .npz file or a folder
    data_dir: Path | None = None  # folder with the data set's files
    limit: int | None = None  # training images used, for a folder also validation images, at least 1; None: all
    image_size: int | None = None  # side in pixels to which a folder's images are scaled; None: not scaled
    workers: int | None = None  # processes that read a folder's images, at least 0; None: one per core, at most 8
    download: bool = False  # let torchvision download CIFAR
    out: Path  # output folder

    def data_choice(self, test_images: int | None = None) -> DataChoice:
        """Return the data set, with ``test_images`` test images; None: all."""
        folder = None if self.data_dir is None else str(self.data_dir)
        return DataChoice(self.data, folder, self.limit, test_images, self.download, self.image_size, self.workers)


@dataclass(frozen=True, kw_only=True)
class TrainedVerb(DataVerb):
    """A verb for a trained model."""

    checkpoint: Path | None = None  # state dict of the trained model; None: train it first

    def start(self, test_images: int | None = None) -> Start:
        """Return the trained network with its data."""
        return trained(
            self.model_choice,
            self.data_choice(test_images),
            checkpoint=self.checkpoint,
            seed=self.seed,
            device=self.device,
        )


class Findings:
    """Results of a study, a frozen dataclass that is saved as ``STEM.json`` and pictures."""

    stem: ClassVar[str]
    unwritten: ClassVar[tuple[str, ...]] = ()
    """Fields that aren't in the JSON document."""

    def __init_subclass__(cls, **knobs: Any) -> None:
        super().__init_subclass__(**knobs)
        cls.__repr__ = Findings.__repr__  # type: ignore[method-assign]  # dataclass would set its own

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self.to_frame().to_string(index=False, max_colwidth=60)}"

    def to_frame(self) -> pandas.DataFrame:
        """Return the document's first table, or the whole document as one row if it has no table."""
        import pandas

        document = self.to_dict()
        tables = filter(None, map(entries_of, document.values()))
        return pandas.json_normalize(next(tables, [document]))

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as a dict that JSON can hold."""
        return plain({name: value for name, value in vars(self).items() if name not in self.unwritten})  # type: ignore[no-any-return]

    def figures(self) -> dict[str, Figure]:
        """Return the pictures by file name without suffix."""
        return {}

    def texts(self) -> dict[str, str]:
        """Return the contents of further text files by file name."""
        return {}

    def save(self, folder: str | Path) -> list[Path]:
        """Write the JSON document, pictures and text files into a folder, created if missing; return their paths."""
        pictures = save_figures(folder, self.figures())
        document = Path(folder, f"{self.stem}.json")
        write_text(document, json.dumps(self.to_dict(), indent=1) + "\n")
        texts = {Path(folder, name): text for name, text in self.texts().items()}
        for path, text in texts.items():
            write_text(path, text)
        return [document, *pictures, *texts]


def save_figures(folder: str | Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write figures as PNG files into a folder, created if missing; return their paths."""
    folder = output_folder(Path(folder))
    files = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        write_figure(files[name], figure, dpi=130)
    return list(files.values())


FindingsType = TypeVar("FindingsType", bound=Findings)


@dataclass(frozen=True, kw_only=True)
class Study(Verb, Generic[FindingsType]):
    """A verb of ``nni-topo analyze``: :meth:`find` computes the findings, :meth:`show` formats them for printing.

    The verb's name is the name of the study's file or folder in ``nni_topo/studies/analysis``; no table lists it.
    """

    out: Path | None = None  # output folder; None: nothing is written

    @property
    def place(self) -> str:
        """The study's command, for error messages."""
        return f"analyze {type(self).__module__.split('.')[3]}"

    def check(self) -> None:
        """Check the fields before anything is loaded or trained; ConfigError if one is out of its range."""

    def find(self, tell: Tell) -> FindingsType:
        """Compute the findings; ``tell`` prints a line about progress."""
        raise NotImplementedError

    def show(self, findings: FindingsType) -> Iterator[RenderableType]:
        """Yield the findings as tables and lines."""
        raise NotImplementedError

    def run(self, console: Console) -> int:
        """Run the study, write its files, and print one JSON document, or tables and the paths of the files."""
        if self.out is not None:
            check_free_disk(self.out)
        self.check()
        findings = self.find(lambda line: console.print(line, markup=False, highlight=False))
        written = []
        if self.out is not None:
            files = [*findings.save(self.out), write_report(self.out)]
            written.append(f"written: {', '.join(map(str, files))}")
        self.put_out(console, findings.to_dict(), [*self.show(findings), *written])
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainedStudy(TrainedVerb, Study[FindingsType]):
    """A study of a trained model."""
