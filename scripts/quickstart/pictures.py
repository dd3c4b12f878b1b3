"""Draw segmentation and detection results next to the ground truth, from arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

DIM = 0.45  # brightness of the background
OPACITY = 0.6  # of masks over the image
INCHES = 2.1  # side of a panel


class Instances(NamedTuple):
    """Objects of one image.

    Attributes:
        boxes: ``[N, 4]``, left, top, right, bottom in pixels.
        masks: ``[N, H, W]``, bool.
        labels: ``[N]``, from 0.
        scores: ``[N]`` in 0…1, or None for ground truth.
    """

    boxes: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


def draw_semantic(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], names: Sequence[str], path: Path, columns: int = 2
) -> None:
    """Draw a PNG of scenes with image, true classes, predicted classes and a legend.

    Args:
        rows: ``(image [H, W, 3] uint8, truth [H, W], prediction [H, W])`` per scene; in the masks, 0 is background and
            k is ``names[k - 1]``.
        names: Class names.
        path: PNG file.
        columns: Scenes per line.
    """
    figure, axes = _panels(len(rows), ("image", "truth", "prediction"), columns)
    palette = np.concatenate([np.zeros((1, 3)), _colours(len(names))])
    for panels, (image, *masks) in zip(axes, rows, strict=True):
        panels[0].imshow(image)
        for axis, mask in zip(panels[1:], masks, strict=True):
            grey = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1) / 255 * DIM
            axis.imshow(np.where(mask[..., None] > 0, palette[mask], grey))
    _legend(figure, names)
    _save(figure, path)


def draw_instances(
    rows: Sequence[tuple[np.ndarray, Instances, Instances]], names: Sequence[str], path: Path, columns: int = 2
) -> None:
    """Draw a PNG of scenes with image, true instances, predicted instances with scores, and a legend.

    Args:
        rows: ``(image [H, W, 3] uint8, truth, prediction)`` per scene; all predictions are drawn.
        names: Class names.
        path: PNG file.
        columns: Scenes per line.
    """
    figure, axes = _panels(len(rows), ("image", "truth", "prediction"), columns)
    for panels, (image, *objects) in zip(axes, rows, strict=True):
        panels[0].imshow(image)
        for axis, these in zip(panels[1:], objects, strict=True):
            _draw_objects(axis, image, these, names)
    _legend(figure, names)
    _save(figure, path)


def _draw_objects(axis: Axes, image: np.ndarray, objects: Instances, names: Sequence[str]) -> None:
    colours = _colours(len(names))
    painted = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1) / 255
    for mask, label in zip(objects.masks, objects.labels, strict=True):
        painted[mask] += OPACITY * (colours[label] - painted[mask])
    axis.imshow(painted)
    for mask, label in zip(objects.masks, objects.labels, strict=True):
        if mask.any():  # outlines separate instances of the same class
            axis.contour(mask, levels=[0.5], colors=[(1 + colours[label]) / 2], linewidths=0.7)
    for number, ((left, top, right, bottom), label) in enumerate(zip(objects.boxes, objects.labels, strict=True)):
        colour = colours[label]
        frame = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=colour, lw=1.1)
        axis.add_patch(frame)
        score = "" if objects.scores is None else f" {objects.scores[number]:.0%}"
        below = top < 0.08 * len(image)  # no room for the text above the box
        axis.text(
            max(left, 0),
            top,
            names[label] + score,
            size=5.5,
            color="black" if colour @ (0.3, 0.59, 0.11) > 0.5 else "white",
            va="top" if below else "bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        )


def _panels(scenes: int, titles: Sequence[str], columns: int) -> tuple[plt.Figure, np.ndarray]:
    """Create a figure and its axes ``[scenes, titles]``, filled row by row."""
    columns = min(columns, scenes)
    lines = -(-scenes // columns)
    size = (INCHES * columns * len(titles), INCHES * lines + 0.6)
    figure, grid = plt.subplots(lines, columns * len(titles), figsize=size, squeeze=False, layout="constrained")
    for axis in grid.flat:
        axis.axis("off")
    for number, axis in enumerate(grid[0]):
        axis.set_title(titles[number % len(titles)], size=10)
    return figure, grid.reshape(lines * columns, len(titles))[:scenes]


def _colours(count: int) -> np.ndarray:
    """Return colours ``[count, 3]`` in 0…1, cycling through matplotlib's tab10."""
    return np.array(plt.get_cmap("tab10").colors)[np.arange(count) % 10]


def _legend(figure: plt.Figure, names: Sequence[str]) -> None:
    patches = [Patch(color=colour, label=name) for name, colour in zip(names, _colours(len(names)), strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(names), 10), frameon=False, handlelength=1)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=140)
    plt.close(figure)
