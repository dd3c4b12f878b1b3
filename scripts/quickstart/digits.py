"""Write scikit-learn's 1,797 handwritten digits as an ImageNet-style folder: train/ and val/, one folder per class.

Digits are enlarged to 32×32 pixels, grey on black. Each training digit is also written five times as it appears in
scenes: coloured, shifted, in several sizes, on a crop of a photograph, next to the edge of another digit.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.quickstart.material import NAMES, Material, background, enlarge, light_colour, load_material, paint

SIDE = 32
COPIES = 5
PIECE_SIDES = (24, 40)  # pixels of the photograph
DIGIT_SIDES = (20, 36)  # pixels
OUTSIDE = 3  # pixels that may be cut off at a border, about a digit's margin
NEIGHBOUR = 0.7  # probability of a digit behind
NEIGHBOUR_DISTANCES = (18, 26)  # pixels between its centre and the image's


def compose(rng: np.random.Generator, number: int, material: Material) -> np.ndarray:
    """Compose a digit on a photograph, ``[SIDE, SIDE, 3]`` uint8.

    Args:
        rng: Random generator.
        number: Index of the digit in the material.
        material: Digits and photographs.
    """
    canvas = background(rng, material.photos, PIECE_SIDES, SIDE)
    if rng.random() < NEIGHBOUR:
        opacity = enlarge(
            material.digits[rng.integers(len(material.digits))], rng.integers(*DIGIT_SIDES, endpoint=True)
        )
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*NEIGHBOUR_DISTANCES)
        middle = SIDE / 2 + distance * np.array([np.sin(angle), np.cos(angle)])
        paint(canvas, opacity, *(middle - len(opacity) / 2).astype(int), light_colour(rng))
    opacity = enlarge(material.digits[number], rng.integers(*DIGIT_SIDES, endpoint=True))
    reach = sorted((-OUTSIDE, SIDE - len(opacity) + OUTSIDE))
    paint(canvas, opacity, *rng.integers(*reach, size=2, endpoint=True), light_colour(rng))
    return canvas.round().astype(np.uint8)


def write_digits(root: Path, copies: int = COPIES) -> None:
    """Write ``root/{train,val}/{0_zero,…}/{index}.png``, and ``{index}_{copy}.png`` for training digits in scenes.

    Args:
        root: Folder to create; an existing one is left alone.
        copies: Scenes per training digit.
    """
    if root.exists():
        return
    unfinished = root.with_name(root.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, material in load_material().items():
        for number, (index, digit, label) in enumerate(zip(*material[:3], strict=True)):
            folder = unfinished / split / f"{label}_{NAMES[label]}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png")
            for copy in range(copies if split == "train" else 0):
                scene = compose(np.random.default_rng((index, copy)), number, material)
                Image.fromarray(scene).save(folder / f"{index:04d}_{copy}.png")
    unfinished.rename(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--copies", type=int, default=COPIES, help="scenes per training digit (default: %(default)s)")
    args = parser.parse_args()
    write_digits(args.root, args.copies)
