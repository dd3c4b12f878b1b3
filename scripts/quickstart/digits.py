"""Writes scikit-learn's 1,797 handwritten digits as an ImageNet-style folder: train/ and val/, one folder a class.

Each digit is enlarged to 32×32 pixels, grey on black. A training digit comes five times more, as it will be met in
scenes: coloured, moved, of several sizes, on a piece of a photograph, beside the edge of another digit.
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
OUTSIDE = 3  # pixels that may be cut off at a border; a digit has about as many without ink
NEIGHBOUR = 0.7  # chance of another digit behind, and how far its centre is from the middle
NEIGHBOUR_DISTANCES = (18, 26)


def compose(rng: np.random.Generator, number: int, material: Material) -> np.ndarray:
    """A digit on a photograph, ``[SIDE, SIDE, 3]`` uint8.

    Args:
        rng: The only source of chance.
        number: Which of the material's digits.
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
    """Write ``root/{train,val}/{0_zero,…}/{index}.png``, and ``{index}_{copy}.png`` of training digits in scenes.

    Args:
        root: Folder to make; one that is there already is kept as it is.
        copies: Scenes of each training digit.
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
    parser.add_argument(
        "--copies", type=int, default=COPIES, help="scenes of each training digit (default: %(default)s)"
    )
    args = parser.parse_args()
    write_digits(args.root, args.copies)
