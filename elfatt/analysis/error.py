"""Measure the error of each mechanism against softmax attention on the same queries, keys and values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import create_transform, resolve_model_data_config

import elfatt  # noqa: F401  registers the models with timm
from elfatt.analysis.approximation import COLUMNS, MECHANISMS, compare, layer_qkv, random_qkv, sweep
from elfatt.analysis.environment import describe_environment
from elfatt.analysis.plots import pyplot
from elfatt.analysis.results import save_rows, to_markdown
from elfatt.attention.base import QKVAttention
from elfatt.backbones.zoo import list_models
from elfatt.checkpoints import load_checkpoint
from elfatt.data import read_image
from elfatt.keywords import Keywords
from elfatt.suggest import did_you_mean

LEARNED = "this layer, with its position terms"
KEY = ("mechanism", "block_size", "channel_split")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``error`` command."""
    add = parser.add_argument
    add("--blocks", type=int, nargs="+", default=[2, 4, 7, 14, 28], metavar="SIDE", help="ELFATT's, in tokens")
    add("--splits", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], metavar="SHARE", help="c1/c of ELFATT")
    add("--plot", type=Path, metavar="FILE.png", help="plot ELFATT over block size and channel split")
    add("--results", type=Path, metavar="FILE.json", help="results file to add to")
    add("--seed", type=int, default=0, help="seed of random q, k, v and of random weights (0)")
    add = parser.add_argument_group("random q, k, v (default)").add_argument
    add("--size", type=int, nargs=2, default=[14, 14], metavar=("H", "W"), help="map size in tokens (14 14)")
    add("--dim", type=int, default=64, help="channels (64)")
    add("--heads", type=int, default=2, help="attention heads (2)")
    add("--images", type=int, default=4, help="number of random maps to average over (4)")
    add("--scale", type=float, default=1.0, help="standard deviation of q and k; larger is more peaked (1)")
    add = parser.add_argument_group("q, k, v of a model's layer").add_argument
    add("--model", help="model name, e.g. cswin_tiny_global")
    add("--model-kwargs", nargs="+", action=Keywords, default={}, metavar="K=V", help="as it was trained with")
    add("--checkpoint", type=Path, help="its weights (default: random)")
    add("--layer", default="stages.2.blocks.0.attn", help="default: %(default)s; cubic time in its tokens")
    add("--image", type=Path, help="input image")
    add("--img-size", type=int, default=224, help="input size in pixels (224)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compare the mechanisms, print a Markdown table, and write the requested files."""
    if args.plot:
        pyplot()  # fail early if the package is missing
    names: tuple[str, ...]
    if args.model:
        layer, (q, k, v) = _load_layer(args)
        heads, names = layer.num_heads, ("model", "model_kwargs", "checkpoint", "layer", "image", "img_size", "seed")
    else:
        size = {"images": args.images, "scale": args.scale, "seed": args.seed}
        q, k, v = random_qkv(tuple(args.size), args.dim, **size)
        heads, names = args.heads, ("size", "dim", "heads", "images", "scale", "seed")
    # file names only: results are read on other machines
    chosen = {name: getattr(args, name) for name in names}
    settings = {name: value.name if isinstance(value, Path) else value for name, value in chosen.items()}
    rows = sweep(q, k, v, num_heads=heads, blocks=args.blocks, splits=args.splits)
    if args.model:
        rows.append({"mechanism": LEARNED, **dict.fromkeys(KEY[1:]), **compare(layer, q, k, v)})
    source = ", ".join(f"no {name}" if value is None else f"{name} {value}" for name, value in settings.items())
    _, height, width, channels = q.shape
    print(f"{'Layer' if args.model else 'Random'} q, k, v: map {height} × {width}, {channels} channels; {source}.")
    print("Relative errors against softmax attention in the same heads, without LePE and learned position terms.\n")
    print(to_markdown(["attention", *COLUMNS.values()], [[_label(r), *(f"{r[c]:.3f}" for c in COLUMNS)] for r in rows]))
    if args.plot:
        draw(rows, args.plot, source)
    if args.results:
        head = {"kind": "error", "settings": settings, "environment": describe_environment("cpu")}
        save_rows(args.results, head, rows, KEY)


def draw(rows: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Plot each of ``COLUMNS`` over ELFATT's block size, with one line per channel split.

    Args:
        rows: Rows from ``sweep``.
        path: Figure to write, in any format of matplotlib.
        title: Title above the panels.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    plt = pyplot()
    splits = sorted({row["channel_split"] for row in rows if row["mechanism"] == "elfatt"})
    softmax = next(row for row in rows if row["mechanism"] == "vanilla")
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, (column, heading) in zip(axes.T.flat, COLUMNS.items(), strict=True):
        for i, split in enumerate(splits):
            found = [row for row in rows if row["channel_split"] == split]
            style = {"color": plt.cm.viridis(0.9 * i / max(1, len(splits) - 1)), "label": f"c1/c = {split:g}"}
            if found[0]["block_size"] is None:
                axis.axhline(found[0][column], **style)
            else:
                axis.plot([row["block_size"] for row in found], [row[column] for row in found], "o-", **style)
        axis.axhline(softmax[column], color="black", linestyle="--", linewidth=1, label="softmax attention")
        axis.set_xscale("log", base=2)
        sides = sorted({row["block_size"] for row in rows if row["block_size"]})
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.set(title=heading, xlabel="block size in tokens", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(title, size=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _load_layer(args: argparse.Namespace) -> tuple[QKVAttention, tuple[torch.Tensor, ...]]:
    if args.model not in list_models():
        raise ValueError(f"unknown model {args.model!r}{did_you_mean(args.model, list_models())}")
    if args.image is None:
        raise ValueError("--model needs an input: pass --image FILE")
    torch.manual_seed(args.seed)
    try:
        model = timm.create_model(args.model, img_size=args.img_size, **args.model_kwargs)
    except TypeError as error:
        raise ValueError(f"--model-kwargs: {error}") from error
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, allow=("head.",))  # the classifier is not needed
    config = resolve_model_data_config(model) | {"input_size": (3, args.img_size, args.img_size)}
    image = create_transform(**config)(read_image(args.image))[None]
    qkv = layer_qkv(model, args.layer, image)
    return cast(QKVAttention, model.get_submodule(args.layer)), qkv


def _label(row: dict[str, Any]) -> str:
    parts = [row["mechanism"], *(f"{name} {value}" for name, value in MECHANISMS.get(row["mechanism"], {}).items())]
    if row["channel_split"] is not None:
        parts.append(f"c1/c = {row['channel_split']:g}")
    if row["block_size"] is not None:
        parts.append(f"block {row['block_size']}")
    return ", ".join(parts)
