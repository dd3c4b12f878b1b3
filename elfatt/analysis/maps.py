"""Draw Score-CAM and attention maps of several models side by side, as a PNG and an HTML page.

Attention maps are averaged over the heads of a stage's last block. r below a map is its Pearson correlation with the
reference's map: that of the first model with vanilla attention, else of the first model.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from elfatt.analysis.approximation import layer_qkv, received_attention
from elfatt.analysis.plots import pyplot
from elfatt.analysis.scaling import parse_model
from elfatt.attention.base import QKVAttention
from elfatt.attention.vanilla import VanillaAttention
from elfatt.backbones.zoo import check_model
from elfatt.checkpoints import load_checkpoint
from elfatt.data.images import list_images, read_image

STAGE = re.compile(r"stages\.(\d+)\.")
LEAST_SIDE = 64  # pixels: the last stage has four tokens
TITLE_WIDTH = 32  # characters that fit above an image


@dataclass
class Subject:
    """A model to visualise.

    Attributes:
        name: Name shown with the maps.
        model: Classifier, or backbone of a dense model.
        is_classifier: Whether the outputs are class scores.
        classes: Class names by output index.
    """

    name: str
    model: nn.Module
    is_classifier: bool = True
    classes: dict[int, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[int, str]:
        """Last attention layer of each stage, by stage number from 1."""
        names = [name for name, module in self.model.named_modules() if isinstance(module, QKVAttention)]
        return {int(stage[1]) + 1: name for name in names if (stage := STAGE.search(name))}

    @property
    def is_vanilla(self) -> bool:
        """Whether all of its attention is vanilla."""
        return all(type(m) is VanillaAttention for m in self.model.modules() if isinstance(m, QKVAttention))


@dataclass
class Picture:
    """A heat map over an image.

    Attributes:
        title: Title.
        heat: Map ``[h, w]``.
        query: Row and column of the query in tokens.
        caption: Predicted classes, or why there is no map.
        r: Correlation with the reference's map; None for the reference itself.
    """

    title: str
    heat: np.ndarray | None
    query: tuple[int, int] | None = None
    caption: str = ""
    r: float | None = None

    @property
    def note(self) -> str:
        """Caption and correlation, on a line each."""
        return "\n".join(filter(None, (self.caption, "" if self.r is None else f"r = {self.r:.2f}")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``maps`` command."""
    add = parser.add_argument
    add("images", type=Path, nargs="+", help="image files or folders")
    text = "models as for scaling, or .py configs of dense models (backbone only)"
    add("--models", nargs="+", required=True, metavar="NAME", help=text)
    add("--checkpoints", type=Path, nargs="+", metavar="FILE", help="one per model (default: random weights)")
    add("--side", type=int, default=224, help="shorter side of the images in pixels (default: %(default)s)")
    text = "pixel of the query (default: the reference's most attended token)"
    add("--query", type=int, nargs=2, metavar=("X", "Y"), help=text)
    add("--no-cam", action="store_true", help="skip Score-CAM, which takes one pass per channel")
    add("--output", type=Path, default=Path("maps.png"), help="PNG; the page goes next to it (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw the maps of every image.

    Raises:
        ValueError: Arguments that do not fit each other.
    """
    if args.output.suffix != ".png":
        raise ValueError(f"--output {args.output} must end in .png")
    if args.side < LEAST_SIDE:
        raise ValueError(f"--side must be at least {LEAST_SIDE}, got {args.side}")
    if args.checkpoints and len(args.checkpoints) != len(args.models):
        raise ValueError(f"{len(args.checkpoints)} --checkpoints for {len(args.models)} --models: pass one per model")
    files = [file for path in args.images for file in (list_images(path)[0].values() if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"{' '.join(map(str, args.images))} contains no images")
    if args.query:
        for file in files:
            locate(args.query, read_image(file).size)
    checkpoints = args.checkpoints or [None] * len(args.models)
    subjects = [load(name, file) for name, file in zip(args.models, checkpoints, strict=True)]
    sheet = []
    for file in files:
        print(file, file=sys.stderr)
        original = read_image(file)
        query = args.query and locate(args.query, original.size)
        image = resize(original, args.side)
        sheet.append((file.name, image, picture_rows(subjects, image, query, not args.no_cam)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    page = args.output.with_suffix(".html")
    draw_sheet(sheet, [subject.name for subject in subjects], args.output)
    page.write_text(write_page(sheet, [subject.name for subject in subjects]))
    print(args.output, page, sep="\n")


def load(text: str, checkpoint: Path | None) -> Subject:
    """Load a model by name and options, or the backbone of a dense model by config.

    Raises:
        ValueError: Unknown model, or a checkpoint that does not fit.
    """
    if text.endswith(".py"):
        from elfatt.integrations.mm_models import load_model

        model: Any = load_model(Path(text), "cpu").get_submodule("backbone")
        if checkpoint:  # of a classifier, a backbone or a whole dense model
            model.init_cfg = {"type": "Pretrained", "checkpoint": str(checkpoint)}
            model.init_weights()
        subject = Subject(Path(text).stem, model, is_classifier=False)
    else:
        name, options = parse_model(text)
        check_model(name)
        model = timm.create_model(name, **options)
        subject = Subject(text, model.eval())
        if checkpoint:
            report = load_checkpoint(model, checkpoint)
            subject.classes = {index: label for label, index in (report.class_to_idx or {}).items()}
            options.pop("num_classes", None)  # not one of a checkpoint's options
            if warning := report.other_options(options):
                print(f"warning: {text}: {warning} (as NAME:KEY=VALUE)", file=sys.stderr)
    if not subject.layers:
        raise ValueError(f"{text} has no attention layers of this package: use one of elfatt.list_models()")
    return subject


def resize(image: Image.Image, side: int) -> Image.Image:
    """Resize an image to the given shorter side in pixels."""
    scale = side / min(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)


def locate(pixel: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Convert a pixel to relative coordinates: row and column from 0 to 1.

    Args:
        pixel: Column and row.
        size: Width and height of the image.

    Raises:
        ValueError: The pixel is outside the image.
    """
    if not all(0 <= at < length for at, length in zip(pixel, size, strict=True)):
        raise ValueError(f"--query {pixel[0]} {pixel[1]} is outside an image of {size[0]}×{size[1]} pixels")
    return (pixel[1] + 0.5) / size[1], (pixel[0] + 0.5) / size[0]


def picture_rows(
    subjects: list[Subject], image: Image.Image, query: tuple[float, float] | None = None, cam: bool = True
) -> list[list[Picture]]:
    """Return the maps of each model: Score-CAM, then one per stage.

    Args:
        subjects: The first with vanilla attention (or else the first) is the reference.
        image: RGB image.
        query: Relative row and column; None for the reference's most attended token of each stage.
        cam: Whether to compute Score-CAM.
    """
    reference = next((s for s in subjects if s.is_vanilla), subjects[0])
    order = sorted(subjects, key=lambda subject: subject is not reference)  # the reference selects the queries
    tokens: dict[int, tuple[float, float]] = {}
    rows: dict[int, list[Picture]] = {}
    for subject in order:
        pixels = normalise(image, subject.model)
        row = [score_cam(subject, pixels)] if cam else []
        for stage, layer in subject.layers.items():
            q, k, _ = layer_qkv(subject.model, layer, pixels)
            height, width = q.shape[1:3]
            attention = cast(QKVAttention, subject.model.get_submodule(layer))
            if query is None and stage not in tokens:
                most = received_attention(attention, q, k).mean(1)[0].argmax().item()
                tokens[stage] = (most // width + 0.5) / height, (most % width + 0.5) / width
            share = query or tokens[stage]
            at = int(share[0] * height), int(share[1] * width)
            weights = received_attention(attention, q, k, at[0] * width + at[1]).mean(1)[0]
            row.append(Picture(f"stage {stage}", weights.view(height, width).numpy(), at))
        rows[id(subject)] = row
    for subject in order[1:]:
        for mine, other in zip(rows[id(subject)], rows[id(reference)], strict=True):
            if mine.heat is not None and other.heat is not None and mine.heat.shape == other.heat.shape:
                mine.r = correlation(mine.heat, other.heat)
    return [rows[id(subject)] for subject in subjects]


def normalise(image: Image.Image, model: nn.Module) -> torch.Tensor:
    """Return the image as ``[1, 3, H, W]``, normalised with the mean and std of the model's training."""
    config = getattr(model, "pretrained_cfg", {})
    mean = torch.tensor(config.get("mean", IMAGENET_DEFAULT_MEAN)).view(3, 1, 1)
    std = torch.tensor(config.get("std", IMAGENET_DEFAULT_STD)).view(3, 1, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return ((pixels - mean) / std)[None]


def score_cam(subject: Subject, pixels: torch.Tensor) -> Picture:
    """Compute Score-CAM (arXiv 1910.01279) of the top class at the last stage, and the top-3 scores."""
    if not subject.is_classifier:
        return Picture("Score-CAM", None, caption="a backbone has no class scores")
    try:
        from pytorch_grad_cam import ScoreCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise RuntimeError("Score-CAM needs the package grad-cam: pip install grad-cam, or pass --no-cam") from error
    with torch.inference_mode():
        scores = subject.model(pixels)[0].softmax(0)
    values, labels = scores.topk(min(3, len(scores)))
    names = [subject.classes.get(label, f"class {label}") for label in labels.tolist()]
    caption = ", ".join(f"{name} {value:.0%}" for name, value in zip(names, values.tolist(), strict=True))
    last = cast(nn.Sequential, subject.model.stages)[-1]
    with ScoreCAM(subject.model, [last], lambda x: x.permute(0, 3, 1, 2)) as cam:
        heat = cam(pixels, [ClassifierOutputTarget(labels[0].item())])[0]
    return Picture("Score-CAM", heat, caption=caption)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Pearson correlation of two maps, or 0 if one is constant."""
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


Sheet = list[tuple[str, Image.Image, list[list[Picture]]]]


def draw_sheet(sheet: Sheet, names: list[str], path: Path) -> None:
    """Draw all maps in one file, with one row per image and model."""
    columns = 1 + max(len(row) for _, _, rows in sheet for row in rows)
    lines = [(title, image, name, row) for title, image, rows in sheet for name, row in zip(names, rows, strict=True)]
    heights = [2 * image.height / image.width + 0.7 for _, image, _, _ in lines]  # inches
    figure, axes = pyplot().subplots(
        len(lines),
        columns,
        figsize=(2.6 * columns, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for line, (title, image, name, row) in zip(axes, lines, strict=True):
        for axis in line:
            axis.set_axis_off()
        line[0].imshow(image)
        wrapped = [textwrap.fill(text, TITLE_WIDTH) for text in (name.replace(":", " "), title)]
        line[0].set_title("\n".join(wrapped), fontsize=8)
        for axis, picture in zip(line[1:], row, strict=False):
            shown = draw_picture(axis, image, picture)
            axis.set_title(picture.title, fontsize=8)
            axis.text(0.5, -0.03, picture.note, transform=axis.transAxes, ha="center", va="top", fontsize=6, wrap=True)
            if shown:
                bar = figure.colorbar(shown, ax=axis, shrink=0.7)
                bar.ax.tick_params(labelsize=5)
                bar.ax.yaxis.get_offset_text().set_fontsize(5)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def draw_picture(axis, image: Image.Image, picture: Picture):
    """Overlay a heat map on its image and mark the query with a ring."""
    axis.imshow(image)
    if picture.heat is None:
        return None
    extent = (0, image.width, image.height, 0)
    shown = axis.imshow(picture.heat, extent=extent, alpha=0.6, cmap="viridis", interpolation="bilinear")
    if picture.query:
        y, x = ((at + 0.5) / count for at, count in zip(picture.query, picture.heat.shape, strict=True))
        axis.plot(x * image.width, y * image.height, "o", mfc="none", mec="red", ms=6)
    axis.set(xlim=extent[:2], ylim=extent[2:])
    return shown


def write_page(sheet: Sheet, names: list[str]) -> str:
    """Return all maps as a self-contained HTML page."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>Attention maps</title>",
        "<style>body{font:14px sans-serif;margin:2em}figure{display:inline-block;margin:4px;width:230px;"
        "vertical-align:top}img{width:100%}figcaption{white-space:pre-line}</style>",
        f"<p>{html.escape(' '.join(__doc__.split(chr(10) * 2)[1].split()))}</p>",
    ]
    for title, image, rows in sheet:
        parts.append(f"<h2>{html.escape(title)}</h2><div>{_figure(image, Picture('image', None))}</div>")
        for name, row in zip(names, rows, strict=True):
            cells = "".join(_figure(image, picture) for picture in row)
            parts.append(f"<h3>{html.escape(name)}</h3><div>{cells}</div>")
    return "\n".join(parts)


def _figure(image: Image.Image, picture: Picture) -> str:
    figure, axis = pyplot().subplots(figsize=(3, 2.6), layout="constrained")
    axis.set_axis_off()
    shown = draw_picture(axis, image, picture)
    if shown:
        figure.colorbar(shown, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    pyplot().close(figure)
    data = base64.b64encode(file.getvalue()).decode()
    note = html.escape("\n".join(filter(None, (picture.title, picture.note))))
    return f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{note}</figcaption></figure>'
