"""Source material of the quickstart: scikit-learn's handwritten digits and photographs, and functions to combine them.

The digits are the test set of UCI's Optical Recognition of Handwritten Digits, 1,797 images of 8×8 pixels. They and the
two photographs ship with scikit-learn. Training uses the left part of the photographs, evaluation the held-out digits
and the right part.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

NAMES = "zero one two three four five six seven eight nine".split()
HELD_OUT = 360  # digits
HELD_OUT_COLUMNS = 160  # of the photographs' 640
INK, EDGE = 7.0, 4.0  # ink level, of 16, at a digit's edge, and range of the fade
DIMMED, BRIGHT = 0.5, 160.0  # brightness factor of photographs; minimum brightness of digits


class Material(NamedTuple):
    """Digits and photographs of a split.

    Attributes:
        indices: ``[N]``, the digits' indices in scikit-learn.
        digits: ``[N, 8, 8]``, ink from 0 to 16.
        labels: ``[N]``, 0…9.
        photos: Photographs ``[H, W, 3]``, uint8.
    """

    indices: np.ndarray
    digits: np.ndarray
    labels: np.ndarray
    photos: list[np.ndarray]


def load_material() -> dict[str, Material]:
    """Load the disjoint splits ``train`` and ``val``."""
    data, photos = load_digits(), load_sample_images().images
    chosen = train_test_split(np.arange(len(data.target)), test_size=HELD_OUT, stratify=data.target, random_state=0)
    columns = np.s_[:-HELD_OUT_COLUMNS], np.s_[-HELD_OUT_COLUMNS:]
    return {
        split: Material(indices, data.images[indices], data.target[indices], [photo[:, part] for photo in photos])
        for split, indices, part in zip(("train", "val"), chosen, columns, strict=True)
    }


def background(rng: np.random.Generator, photos: list[np.ndarray], sides: tuple[int, int], size: int) -> np.ndarray:
    """Return a random crop of a photograph, dimmed and randomly mirrored, as ``[size, size, 3]`` float32.

    Args:
        rng: Random generator.
        photos: Photographs ``[H, W, 3]``, uint8, no smaller than the largest crop.
        sides: Minimum and maximum crop size in pixels.
        size: Output size in pixels.
    """
    photo = photos[rng.integers(len(photos))]
    side = rng.integers(*sides, endpoint=True)
    y, x = (rng.integers(0, length - side, endpoint=True) for length in photo.shape[:2])
    piece = Image.fromarray(photo[y : y + side, x : x + side]).resize((size, size), Image.Resampling.BICUBIC)
    return DIMMED * np.asarray(piece, np.float32)[:, :: rng.choice((-1, 1))]


def enlarge(digit: np.ndarray, side: int) -> np.ndarray:
    """Return the opacity ``[side, side]`` of a digit ``[8, 8]`` with ink 0 to 16; its mask is opacity >= 0.5."""
    ink = Image.fromarray(digit.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip((np.asarray(ink) - INK) / EDGE + 0.5, 0, 1)


def light_colour(rng: np.random.Generator) -> np.ndarray:
    """Return a random colour ``[3]``, mixed with white up to the minimum brightness of a digit."""
    colour = rng.uniform(0, 255, size=3)
    dark = colour.mean()
    return colour if dark >= BRIGHT else colour + (BRIGHT - dark) / (255 - dark) * (255 - colour)


def paint(canvas: np.ndarray, opacity: np.ndarray, y: int, x: int, colour: np.ndarray) -> None:
    """Blend a colour with ``opacity`` ``[h, w]`` onto ``canvas`` ``[H, W, 3]`` at corner (y, x), clipped."""
    top, left = max(y, 0), max(x, 0)
    part = canvas[top : max(y + opacity.shape[0], 0), left : max(x + opacity.shape[1], 0)]
    seen = opacity[top - y :, left - x :][: part.shape[0], : part.shape[1], None]
    part += seen * (colour - part)
