"""Generated files in the layouts of public data sets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image


def write_imagenet(root: Path, classes: int, train: int, val: int, size: tuple[int, int] = (40, 32)) -> Path:
    """Write so many JPEGs of every class; each has the class's colour, with noise. Later files are links to early ones.

    A file's name alone makes it an image of its own to a reader, so twenty contents do for any number.
    """
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{1440764 + label:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                name = f"{folder.name}_{index}.JPEG" if part == "train" else f"ILSVRC2012_val_{label}_{index:08d}.JPEG"
                if index == 0:
                    first = folder / name
                if index < 20:
                    noise = np.random.default_rng([label, index]).integers(-40, 41, (size[1], size[0], 3))
                    colour = np.array([60 + 130 * (label % 2), 60 + 130 * (label // 2 % 2), 128])
                    pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / name, quality=90)
                else:
                    os.link(first, folder / name)
    return root
