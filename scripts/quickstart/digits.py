"""Writes scikit-learn's 1,797 handwritten digits as an ImageNet-style folder: train/ and val/, one folder a class.

The images are the UCI test set of Optical Recognition of Handwritten Digits, 8×8 pixels each, and come inside
scikit-learn; here they are enlarged to 32×32.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 32
HELD_OUT = 360
NAMES = "zero one two three four five six seven eight nine".split()


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the images of each split, ``train`` and ``val``: no image is in both.

    Args:
        labels: ``[N]``; each label has the same share in both splits.
    """
    train, val = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    return {"train": train, "val": val}


def write_digits(root: Path) -> None:
    """Write ``root/{train,val}/{0_zero,…}/{index}.png``; an image of the one split never is in the other.

    Args:
        root: Folder to make; one that is there already is kept as it is.
    """
    if root.exists():
        return
    digits = load_digits()
    unfinished = root.with_name(root.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, chosen in split_digits(digits.target).items():
        for index in chosen:
            label = digits.target[index]
            folder = unfinished / split / f"{label}_{NAMES[label]}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digits.images[index] * (255 / 16)).round().astype(np.uint8))
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png")
    unfinished.rename(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder to write")
    write_digits(parser.parse_args().root)
