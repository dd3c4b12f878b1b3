"""Composes scikit-learn's handwritten digits into scenes, written for segmentation and for detection.

One scene is 128×128 pixels: three to seven coloured digits of several sizes, later ones over earlier ones, on a piece
of one of scikit-learn's two photographs. Training scenes hold the digits that `digits.py` trains on and the left of
the photographs; held-out scenes hold the held-out digits and the right. The folder reads as both data sets:

    images/{training,validation}/*.jpg                  ADE20K
    annotations/{training,validation}/*.png             0 other, 1…10 the digits 0…9
    {train,val}2017/*.jpg                               COCO, the same files
    annotations/instances_{train,val}2017.json          the visible part of each digit as run lengths, category 1…10
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from digits import NAMES, split_digits
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SIDE = 128
DIGITS = (3, 7)  # digits in a scene
DIGIT_SIDES = (28, 64)  # pixels
PIECE_SIDES = (96, 160)  # pixels of the photograph
HELD_OUT_COLUMNS = 160  # of 640: as wide as the largest piece
INK, EDGE = 7.0, 4.0  # of 16: darkness where a digit ends, and the range over which it fades
VISIBLE = 0.5  # share of its ink that every digit keeps
ADE20K_NAMES = {"train": "training", "val": "validation"}


class Scene(NamedTuple):
    """A picture and what each pixel shows.

    Attributes:
        image: ``[H, W, 3]``, uint8.
        owner: ``[H, W]``, 0 where the background is seen, k where the k-th digit is.
        labels: The digits 0…9 in the order in which they were laid down.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: list[int]


def enlarge(digit: np.ndarray, side: int) -> np.ndarray:
    """Opacity ``[side, side]`` of a digit ``[8, 8]`` with ink from 0 to 16; from one half upwards it is its mask."""
    ink = Image.fromarray(digit.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip((np.asarray(ink) - INK) / EDGE + 0.5, 0, 1)


def compose(rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray, photos: list[np.ndarray]) -> Scene:
    """One scene.

    Args:
        rng: The only source of chance.
        digits: ``[N, 8, 8]``, ink from 0 to 16.
        labels: ``[N]``, 0…9.
        photos: Backgrounds ``[H, W, 3]``, uint8, no side below the largest piece.
    """
    canvas = _background(rng, photos[rng.integers(len(photos))])
    owner = np.zeros((SIDE, SIDE), np.uint8)
    shown: list[int] = []
    areas: list[int] = []
    count = rng.integers(*DIGITS, endpoint=True)
    while len(shown) < count:
        index = rng.integers(len(digits))
        side = rng.integers(*DIGIT_SIDES, endpoint=True)
        y, x = rng.integers(0, SIDE - side, size=2, endpoint=True)
        square = np.s_[y : y + side, x : x + side]
        opacity = enlarge(digits[index], side)
        mask = opacity >= 0.5
        covered = owner.copy()
        covered[square][mask] = len(shown) + 1
        visible = np.bincount(covered.ravel(), minlength=len(shown) + 2)[1:-1]
        if (visible < VISIBLE * np.array(areas)).any():
            continue  # it would hide another digit: nothing visible may be without a label
        colours = rng.uniform(0, 255, size=(3, 3))
        distances = np.linalg.norm(colours - canvas[square][mask].mean(axis=0), axis=1)
        canvas[square] += opacity[..., None] * (colours[distances.argmax()] - canvas[square])
        owner = covered
        shown.append(int(labels[index]))
        areas.append(int(mask.sum()))
    return Scene(canvas.round().astype(np.uint8), owner, shown)


def _background(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """A random square piece of a photograph, half of the time mirrored, as ``[SIDE, SIDE, 3]`` float32."""
    side = rng.integers(*PIECE_SIDES, endpoint=True)
    y = rng.integers(0, photo.shape[0] - side, endpoint=True)
    x = rng.integers(0, photo.shape[1] - side, endpoint=True)
    piece = Image.fromarray(photo[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(piece, np.float32)[:, :: rng.choice((-1, 1))].copy()


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask ``[H, W]`` as COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"counts": np.diff(changes, prepend=0, append=flat.size).tolist(), "size": list(mask.shape)}


def instances(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations of a scene, without ids; the mask of a digit is what is seen of it."""
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


def write_scenes(root: Path, train: int = 400, val: int = 100, seed: int = 0) -> None:
    """Write the folder that the head of this file describes.

    Args:
        root: Folder to make; one that is there already is kept as it is.
        train: Training scenes.
        val: Held-out scenes.
        seed: A scene depends on the seed and its number alone.
    """
    if root.exists():
        return
    unfinished = root.with_name(root.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    data = load_digits()
    photos = load_sample_images().images
    columns = {"train": np.s_[:-HELD_OUT_COLUMNS], "val": np.s_[-HELD_OUT_COLUMNS:]}
    for stream, (split, chosen) in enumerate(split_digits(data.target).items()):
        material = data.images[chosen], data.target[chosen], [photo[:, columns[split]] for photo in photos]
        numbers = range({"train": train, "val": val}[split])
        scenes = [compose(np.random.default_rng((seed, stream, n)), *material) for n in numbers]
        _write_split(unfinished, split, scenes)
    unfinished.rename(root)


def _write_split(root: Path, split: str, scenes: list[Scene]) -> None:
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
    parser.add_argument("--train", type=int, default=400, help="training scenes")
    parser.add_argument("--val", type=int, default=100, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    write_scenes(**vars(parser.parse_args()))
