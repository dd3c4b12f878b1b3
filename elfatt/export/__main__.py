"""``python -m elfatt.export``: export a model to another runtime and verify it against PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch import nn
from tqdm import tqdm

from elfatt.backbones.zoo import check_model
from elfatt.checkpoints import load_checkpoint
from elfatt.console import replace_unprintable
from elfatt.data.images import list_images, read_image
from elfatt.export import PRECISIONS, RUNTIMES, export, size_limit
from elfatt.export.runtimes import UNSUPPORTED
from elfatt.keywords import Keywords

BATCH = 16  # for evaluation


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    replace_unprintable()
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    parser = argparse.ArgumentParser(prog="python -m elfatt.export", description=__doc__.split(": ", 1)[1])
    add = parser.add_argument
    add("model", help="model in elfatt.list_models(); with --size, any timm model or a segmentor's config")
    add("--to", required=True, choices=(*RUNTIMES, *UNSUPPORTED), help="target runtime")
    add("--checkpoint", type=Path, help="checkpoint (default: random weights)")
    add("--output", type=Path, help="output file (default: the model's name)")
    add("--size", type=_positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="fixed image size (default: dynamic)")
    add("--num-classes", type=_positive, help="number of classes (default: the model's)")
    add("--model-kwargs", nargs="*", default={}, action=Keywords, help="model keyword arguments, e.g. block_size=7")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    add("--calibration", type=Path, metavar="FOLDER", help="calibration images for int8")
    add("--batch-size", type=_positive, help="batch size to tune TensorRT for (default: 1)")
    add("--images", type=_positive, default=128, help="maximum number of calibration images (default: %(default)s)")
    add("--crop-pct", type=float, help="evaluation crop ratio (default: the model's)")
    add("--evaluate", type=Path, metavar="FOLDER", help="compare accuracy on a folder of images per class")
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def run(args: argparse.Namespace) -> None:
    """Export, check and evaluate.

    Raises:
        ValueError: Arguments that do not fit the model or each other.
        RuntimeError: The exported model differs from PyTorch's.
    """
    if args.to in UNSUPPORTED:
        raise ValueError(f"{args.to} cannot run these models: {UNSUPPORTED[args.to]}")
    is_dense = args.model.endswith(".py")
    if args.calibration and args.precision != "int8":
        raise ValueError(f"--calibration is for int8, not {args.precision}: pass --precision int8 or omit it")
    if args.batch_size and args.to != "tensorrt":
        raise ValueError(f"--batch-size is for tensorrt, not {args.to}: omit it")
    if is_dense and (args.model_kwargs or args.num_classes):
        raise ValueError(f"--model-kwargs and --num-classes do not apply to {args.model}: set them in the config")
    if args.evaluate and not args.evaluate.is_dir():
        raise ValueError(f"--evaluate {args.evaluate} is not a folder")
    if is_dense:
        if args.size is None:
            raise ValueError(f"{args.model} supports a fixed image size only: pass --size")
        if args.evaluate:
            raise ValueError(f"--evaluate does not apply to {args.model}: it compares classifiers")
        from elfatt.integrations.mm_models import load_segmentor

        model: nn.Module = load_segmentor(Path(args.model))
    else:
        check_model(args.model)
        model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs).eval()
    allow = ("auxiliary_head.",) if is_dense else ()
    labels = None
    if args.checkpoint:
        report = load_checkpoint(model, args.checkpoint, allow=allow)
        labels = report.class_to_idx
        if not is_dense and (warning := report.other_options(args.model_kwargs)):
            print(f"warning: {warning} (--model-kwargs)", file=sys.stderr)
    size = tuple(args.size) if args.size else None
    transform, side = _transform(model, size, args.crop_pct)
    if (args.calibration or args.evaluate) and size is None and side < (limit := size_limit(model)):
        raise ValueError(f"images of {side} pixels are below the minimum of {limit}: pass --size {side} {side}")
    data = args.evaluate and labelled_images(args.evaluate, transform, labels, cast(int, model.num_classes))
    images = calibration_images(args.calibration, transform, args.images) if args.calibration else []
    path = args.output or Path((Path(args.model).stem if is_dense else args.model) + RUNTIMES[args.to].suffix)
    for shape, difference in export(model, args.to, path, size, args.precision, images, args.batch_size or 1):
        print(f"{'×'.join(map(str, shape))}: differs from PyTorch by {difference:.1e}")
    batch, side = RUNTIMES[args.to].largest
    sizes = f"{size[0]}×{size[1]} pixels" if size else f"{size_limit(model)} to {side} pixels a side"
    print(f"wrote {path}: batches of up to {batch} images of {sizes}")
    if data:
        run_file = RUNTIMES[args.to].load(path)
        before = accuracy(torch.inference_mode()(model), data)
        after = accuracy(lambda batch: torch.from_numpy(run_file(batch)), data)
        print(f"top-1 on {len(data)} images: PyTorch {before:.2%}, {args.to} {args.precision} {after:.2%}")


def _transform(model: nn.Module, size: tuple[int, int] | None, crop_pct: float | None) -> tuple[Callable, int]:
    """Return timm's evaluation transform and the shorter side of its output."""
    options = {"crop_pct": crop_pct} | ({"input_size": (3, *size)} if size else {})
    config = resolve_data_config(options, model=model)
    return create_transform(**config), min(config["input_size"][1:])


def calibration_images(folder: Path, transform: Callable, limit: int) -> list[torch.Tensor]:
    """Return up to ``limit`` normalised images ``[1, 3, H, W]``, evenly spaced over the folder.

    Raises:
        ValueError: No images.
    """
    files = list(list_images(folder)[0].values())
    if not files:
        raise ValueError(f"--calibration {folder} contains no images")
    count = min(limit, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    return [transform(read_image(file))[None] for file in chosen]


def labelled_images(folder: Path, transform: Callable, labels: dict[str, int] | None, num_classes: int) -> ImageDataset:
    """Open a folder with one subfolder of images per class, using the checkpoint's labels if known.

    Raises:
        ValueError: The number of classes is not the model's.
    """
    data = ImageDataset(str(folder), class_map=labels or "", transform=transform)
    count = len(labels or data.reader.class_to_idx)
    if count != num_classes:
        raise ValueError(f"{folder} has {count} classes, the model {num_classes}: pass --num-classes {count}")
    return data


def accuracy(run: Callable[[torch.Tensor], torch.Tensor], data: ImageDataset) -> float:
    """Return the top-1 accuracy as a fraction."""
    hits = 0
    for images, labels in tqdm(_batches(data), "images", total=-(-len(data) // BATCH), disable=None, leave=False):
        hits += (run(images).argmax(1) == labels).sum().item()
    return hits / len(data)


def _batches(data: ImageDataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(data), BATCH):
        images, labels = zip(*(data[i] for i in range(start, min(start + BATCH, len(data)))), strict=True)
        yield torch.stack(images), torch.tensor(labels)


if __name__ == "__main__":
    sys.exit(main())
