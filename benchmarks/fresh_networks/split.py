"""Split Fashion-MNIST's training file anew: 25,000 training images and 5,000 test images that no table has tested on.

    python benchmarks/fresh_networks/split.py --data-dir DIR --out runs/fresh/images.npz

The test images come from the training file, whose images were never a test set here. Those that `load_data` holds out
for validation aren't taken: defaults were chosen on them. The networks of this comparison aren't trained on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from nni_topo.zoo.sources import class_rank, read_idx_folder, stratified_fraction

CLASSES = 10
TEST = 5_000
TRAIN = 25_000
SEED = 100


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file")
    options = parser.parse_args()
    images, labels = training_file(options.data_dir)
    train, test = split(labels)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        options.out, x_train=images[train], y_train=labels[train], x_test=images[test], y_test=labels[test]
    )
    print(f"{len(train)} training images and {len(test)} test images: {options.out}")


def training_file(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of Fashion-MNIST's training file."""
    names = tuple(str(label) for label in range(CLASSES))
    raw = read_idx_folder(folder=folder, kind="FashionMNIST", class_names=names, download=False)
    return raw.train_images, raw.train_labels


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the training and of the test images in the training file, each evenly from the classes."""
    used_for_choices = stratified_fraction(labels, 0.1, np.random.default_rng(0))  # as `load_data` with its defaults
    left = np.flatnonzero(~used_for_choices)
    generator = np.random.default_rng(SEED)
    rank = class_rank(labels[left], generator)
    test = left[rank < TEST // CLASSES]
    train = left[(rank >= TEST // CLASSES) & (rank < (TEST + TRAIN) // CLASSES)]
    return generator.permutation(train), generator.permutation(test)


if __name__ == "__main__":
    main()
