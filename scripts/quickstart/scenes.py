"""Compose scikit-learn's handwritten digits into scenes for segmentation and detection.

A scene is 128×128 pixels: three to seven coloured digits of several sizes, later ones over earlier ones, on a crop of a
photograph. The folder has the layouts of both datasets:

    images/{training,validation}/*.jpg                  ADE20K
    annotations/{training,validation}/*.png             0 background, 1…10 the digits 0…9
    {train,val}2017/*.jpg                               COCO, the same files
    annotations/instances_{train,val}2017.json          visible part of each digit as run lengths, category 1…10
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scripts.quickstart.material import NAMES, Material, background, enlarge, light_colour, load_material, paint

SIDE = 128
DIGITS = (3, 7)  # digits in a scene
DIGIT_SIDES = (32, 52)  # pixels
PIECE_SIDES = (96, 160)  # pixels of the photograph
VISIBLE = 0.85  # minimum visible share of every digit
ADE20K_NAMES = {"train": "training", "val": "validation"}


class Scene(NamedTuple):
    """An image and the digit visible at each pixel.

    Attributes:
        image: ``[H, W, 3]``, uint8.
        owner: ``[H, W]``, 0 for background, k for the k-th digit.
        labels: Digits 0…9 in drawing order.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: list[int]


def compose(rng: np.random.Generator, material: Material) -> Scene:
    """Compose one scene.

    Args:
        rng: Random generator.
        material: Digits and photographs.
    """
    canvas = background(rng, material.photos, PIECE_SIDES, SIDE)
    owner = np.zeros((SIDE, SIDE), np.uint8)
    shown: list[int] = []
    areas: list[int] = []
    count = rng.integers(*DIGITS, endpoint=True)
    while len(shown) < count:
        index = rng.integers(len(material.digits))
        side = rng.integers(*DIGIT_SIDES, endpoint=True)
        y, x = rng.integers(0, SIDE - side, size=2, endpoint=True)
        opacity = enlarge(material.digits[index], side)
        mask = opacity >= 0.5
        covered = owner.copy()
        covered[y : y + side, x : x + side][mask] = len(shown) + 1
        visible = np.bincount(covered.ravel(), minlength=len(shown) + 2)[1:-1]
        if (visible < VISIBLE * np.array(areas)).any():
            continue  # would hide another digit too much
        paint(canvas, opacity, y, x, light_colour(rng))
        owner = covered
        shown.append(int(material.labels[index]))
        areas.append(int(mask.sum()))
    return Scene(canvas.round().astype(np.uint8), owner, shown)


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode a mask ``[H, W]`` as COCO's uncompressed run lengths: column-major, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"counts": np.diff(changes, prepend=0, append=flat.size).tolist(), "size": list(mask.shape)}


def instances(scene: Scene) -> list[dict[str, Any]]:
    """Return the COCO annotations of a scene without ids, with masks of the visible parts."""
    annotations = []
    for number, label in enumerate(scene.labels, start=1):
        mask = scene.owner == number
        ys, xs = np.nonzero(mask)
        x, y = int(xs.min()), int(ys.min())
        annotations.append(
            {
                "category_id": label + 1,
                "bbox": [x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": run_lengths(mask),
            }
        )
    return annotations


def write_scenes(root: Path, train: int = 2000, val: int = 100, seed: int = 0) -> None:
    """Write the folder described in the module docstring.

    Args:
        root: Folder to create; an existing one is left alone.
        train: Number of training scenes.
        val: Number of held-out scenes.
        seed: Random seed; a scene only depends on the seed, its split and its number.
    """
    if root.exists():
        return
    unfinished = root.with_name(root.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for stream, (split, material) in enumerate(load_material().items()):
        numbers = range({"train": train, "val": val}[split])
        _write_split(unfinished, split, (compose(np.random.default_rng((seed, stream, n)), material) for n in numbers))
    unfinished.rename(root)


def _write_split(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    images = root / "images" / ADE20K_NAMES[split]
    masks = root / "annotations" / ADE20K_NAMES[split]
    links = root / f"{split}2017"
    for folder in (images, masks, links):
        folder.mkdir(parents=True)
    coco: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(NAMES)],
    }
    for number, scene in enumerate(scenes, start=1):
        name = f"{split}_{number:05d}"
        Image.fromarray(scene.image).save(images / f"{name}.jpg", quality=95)
        os.link(images / f"{name}.jpg", links / f"{name}.jpg")
        values = np.array([0, *(label + 1 for label in scene.labels)], np.uint8)
        Image.fromarray(values[scene.owner]).save(masks / f"{name}.png")
        coco["images"].append({"id": number, "file_name": f"{name}.jpg", "width": SIDE, "height": SIDE})
        for annotation in instances(scene):
            coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": number, **annotation})
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="number of training scenes")
    parser.add_argument("--val", type=int, default=100, help="number of held-out scenes")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    write_scenes(**vars(parser.parse_args()))
