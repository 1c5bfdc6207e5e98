"""The photos that the comparison on EfficientNet-Lite0 uses, and random crops of them.

All photos are files that ordinary packages install; nothing is downloaded. A photo belongs to one part only:
``calibration`` photos are what recovery learns from, ``validation`` photos decide between settings, and ``test`` photos
are looked at for the tables alone. Two photos of one scene count as one photo, so only one of them is listed.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as pixels
from torchvision.transforms import v2

SIDE = 128
MEAN, STD = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)
"""EfficientNet-Lite's inputs lie in [-1, 1]: its authors subtract 127 and divide by 128."""

Part = Literal["calibration", "validation", "test"]

_DEBIAN_DOCS = "/usr/share/doc/opencv-doc/examples"
_DEBIAN_PICTURES = "/usr/share/backgrounds/mate"

SOURCES: dict[str, tuple[str, str, str]] = {
    # short name: (package, where the files are, licence)
    "skimage": ("scikit-image (PyPI)", "skimage:data", "public domain, CC0 or as its data/README says"),
    "sklearn": ("scikit-learn (PyPI)", "sklearn:datasets/images", "CC BY 2.0, danielbuechele and vultilion"),
    "matplotlib": ("matplotlib (PyPI)", "matplotlib:mpl-data/sample_data", "public domain, US Navy"),
    "opencv": (
        "opencv-doc (Debian)",
        _DEBIAN_DOCS,
        "Apache-2.0 and BSD-3-Clause, as the package's copyright file says",
    ),
    "mate": ("mate-backgrounds (Debian)", _DEBIAN_PICTURES, "GPL-2+, photographers in the package's copyright file"),
}

PHOTOS: dict[Part, tuple[str, ...]] = {
    "calibration": (
        "skimage/camera.png",
        "skimage/hubble_deep_field.jpg",
        "skimage/gravel.png",
        "skimage/brick.png",
        "skimage/grass.png",
        "skimage/motorcycle_left.png",
        "skimage/retina.jpg",
        "sklearn/flower.jpg",
        "matplotlib/grace_hopper.jpg",
        "opencv/alphamat/input_images/plant.jpg",
        "opencv/data/aloeL.jpg",
        "opencv/data/apple.jpg",
        "opencv/data/basketball1.png",
        "opencv/data/blox.jpg",
        "opencv/data/board.jpg",
        "opencv/data/box_in_scene.png",
        "opencv/data/butterfly.jpg",
        "opencv/data/ela_original.jpg",
        "opencv/data/graf1.png",
        "opencv/data/home.jpg",
        "opencv/data/left.jpg",
        "opencv/data/left01.jpg",
        "opencv/data/licenseplate_motion.jpg",
        "opencv/data/rubberwhale1.png",
        "opencv/data/squirrel_cls.jpg",
        "opencv/data/starry_night.jpg",
        "opencv/data/stuff.jpg",
        "opencv/hfs/data/002.jpg",
        "opencv/reg/home.png",
        "opencv/text/scenetext02.jpg",
        "opencv/text/scenetext03.jpg",
        "opencv/text/scenetext05.jpg",
        "opencv/text/scenetext06.jpg",
        "opencv/text/scenetext_segmented_word01.jpg",
        "opencv/text/scenetext_segmented_word04.jpg",
        "mate/nature/Aqua.jpg",
        "mate/nature/FreshFlower.jpg",
        "mate/nature/GreenMeadow.jpg",
        "mate/nature/Storm.jpg",
        "mate/nature/TwoWings.jpg",
    ),
    "validation": (
        "skimage/moon.png",
        "opencv/data/aero1.jpg",
        "opencv/data/baboon.jpg",
        "opencv/data/orange.jpg",
        "opencv/text/scenetext_segmented_word02.jpg",
        "opencv/text/scenetext04.jpg",
        "mate/nature/Garden.jpg",
        "mate/nature/RainDrops.jpg",
    ),
    "test": (
        "skimage/astronaut.png",
        "skimage/chelsea.png",
        "skimage/coffee.png",
        "skimage/coins.png",
        "skimage/ihc.png",
        "skimage/rocket.jpg",
        "sklearn/china.jpg",
        "opencv/data/building.jpg",
        "opencv/data/chicky_512.png",
        "opencv/data/fruits.jpg",
        "opencv/data/leuvenA.jpg",
        "opencv/data/messi5.jpg",
        "opencv/data/smarties.png",
        "opencv/data/sudoku.png",
        "opencv/hfs/data/000.jpg",
        "opencv/hfs/data/001.jpg",
        "opencv/text/scenetext01.jpg",
        "opencv/text/scenetext_segmented_word03.jpg",
        "opencv/text/scenetext_segmented_word05.jpg",
        "mate/nature/Blinds.jpg",
        "mate/nature/Dune.jpg",
        "mate/nature/LadyBird.jpg",
        "mate/nature/Wood.jpg",
        "mate/nature/YellowFlower.jpg",
    ),
}

KNOWN: dict[str, tuple[str, ...]] = {
    # ImageNet's names for what is seen, for a check that the unpruned network is loaded as it was trained
    "skimage/astronaut.png": ("space shuttle",),
    "skimage/chelsea.png": ("tabby", "tiger cat", "Egyptian cat"),
    "skimage/coffee.png": ("espresso", "cup"),
    "skimage/motorcycle_left.png": ("moped", "motor scooter", "disk brake", "crash helmet"),
    "sklearn/china.jpg": ("palace", "monastery", "stupa", "bell cote"),
    "sklearn/flower.jpg": ("daisy",),
    "matplotlib/grace_hopper.jpg": ("military uniform", "pickelhaube", "bearskin"),
    "opencv/data/baboon.jpg": ("baboon",),
    "opencv/data/butterfly.jpg": ("monarch", "admiral", "ringlet", "lycaenid", "cabbage butterfly"),
    "opencv/data/messi5.jpg": ("soccer ball", "rugby ball"),
    "opencv/data/orange.jpg": ("orange", "lemon"),
    "opencv/data/squirrel_cls.jpg": ("fox squirrel",),
    "mate/nature/LadyBird.jpg": ("ladybug",),
}


@dataclass(frozen=True)
class Crops:
    """Crops of some photos, photo after photo."""

    images: Tensor  # (crops, 3, SIDE, SIDE), as the network takes them
    photos: Tensor  # (crops,), the number of the photo that each is from

    def batches(self, size: int = 64) -> list[Tensor]:
        """Return the crops in batches."""
        return list(self.images.split(size))


class MissingPhotosError(Exception):
    """Packages with photos aren't installed; ``str`` says which."""


def path_of(name: str) -> Path:
    """Return a photo's file, whether it exists or not; ``PHOTOS_SKIMAGE`` and so on name folders of one's own."""
    source, _, rest = name.partition("/")
    place = os.environ.get(f"PHOTOS_{source.upper()}", SOURCES[source][1])
    package, _, folder = place.partition(":")
    if not folder:
        return Path(place) / rest
    found = importlib.util.find_spec(package)
    home = Path(found.origin).parent if found is not None and found.origin else Path("not installed")
    return home / folder / rest


def missing() -> list[str]:
    """Return the packages that lack files of the list."""
    lacking = {name.partition("/")[0] for part in PHOTOS.values() for name in part if not path_of(name).is_file()}
    return [SOURCES[source][0] for source in SOURCES if source in lacking]


def open_photo(name: str, longest: int = 1024) -> Image.Image:
    """Return a photo in RGB, its longer side at most so many pixels."""
    path = path_of(name)
    if not path.is_file():
        raise MissingPhotosError(f"photos must be installed, missing: {', '.join(missing())} ({path})")
    with Image.open(path) as file:
        photo = file.convert("RGB")
    photo.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return photo


def random_crops(
    part: Part, count: int, seed: int, *, photos: int | None = None, least: float = 0.25, flip: bool = True
) -> Crops:
    """Return random resized crops of a part's photos, equally many of each, up to one.

    ``least`` is the smallest share of a photo's area that a crop has; ``photos`` takes only so many photos, drawn from
    the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(PHOTOS[part])
    if photos is not None:
        chosen = torch.randperm(len(names), generator=generator)[:photos].sort().values
        names = [names[at] for at in chosen]
    images, owners = [], []
    for at, name in enumerate(names):
        photo = open_photo(name)
        for _ in range(count // len(names) + (at < count % len(names))):
            images.append(_random_crop(photo, least, flip, generator))
            owners.append(at)
    found = torch.stack(images).float().div_(255.0)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return Crops(found.sub_(mean).div_(std), torch.tensor(owners))


def _random_crop(photo: Image.Image, least: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Return one crop, uint8; torchvision draws from the global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        top, left, height, width = v2.RandomResizedCrop.make_params(
            v2.RandomResizedCrop(SIDE, scale=(least, 1.0)), [pixels.pil_to_tensor(photo)]
        ).values()
        is_flipped = flip and bool(torch.rand(()) < 0.5)
    box = (left, top, left + width, top + height)
    crop = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    found = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1)
    return found.flip(2) if is_flipped else found
