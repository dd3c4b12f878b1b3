"""Evaluate a checkpoint: ``python -m classification.validate --config FILE --data-dir FOLDER --checkpoint FILE``.

Runs standalone or under torchrun; each image counts exactly once on any number of processes. Published accuracies are
those of the EMA weights, used by default if present, and of the authors' crop, used for the authors' own weights
whatever the config says, unless ``--crop-pct`` or ``--crop-mode`` is given on the command line.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

import elfatt  # noqa: F401  registers the models with timm
from classification.config import build_parser, parse_args
from classification.data import BrokenImages, Loader, data_config
from classification.evaluate import evaluate
from classification.runtime import LOGGER, autocast, build_model, init_world, load_weights, run_main
from classification.splits import check_class_count, open_split
from elfatt.checkpoints import LoadReport, published_crop
from elfatt.data import UserError

CHOSEN = ("model", "checkpoint", "weights", "backend")
COLUMNS = (*CHOSEN, "top1", "top5", "loss", "images", "images_per_s")  # of the results file
WEIGHTS = {"ema": "averaged (EMA) weights", "raw": "raw weights"}


def run(argv: list[str] | None) -> dict[str, float | str]:
    """Run an evaluation and return the results.

    Raises:
        UserError: Invalid data, options or checkpoint.
    """
    args = parse_args(argv, train=False)
    world = init_world(args.device, args.backend)
    if args.results_file and world.primary:
        check_table(Path(args.results_file))
    model = build_model(args)
    report = load_weights(model, args.checkpoint, use_ema=args.use_ema)
    if warning := report.other_options(args.model_kwargs):
        LOGGER.warning("%s (--model-kwargs)", warning)
    dataset = open_split(args, train=False, trained=report.class_to_idx)
    if not report.class_to_idx:
        check_class_count(dataset, model.num_classes)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(world.device, memory_format=memory_format)
    broken = BrokenImages(args.max_broken_images)
    config = evaluation_config(argv, args, model, report)
    loader = Loader(dataset, args, config, world, broken, train=False)
    if world.distributed and not loader.seekable:
        LOGGER.warning("%s shards the images itself: check the number of images below", args.dataset)
    loader.seek(0)
    compiled = torch.compile(model) if args.compile else model
    scores = evaluate(compiled, loader, world, autocast(args, world.device), args.channels_last)
    values = args.model, args.checkpoint, report.weights, args.backend
    results = {**dict(zip(CHOSEN, values, strict=True)), **scores}
    if world.primary:
        print(f"{args.model}, {WEIGHTS[report.weights]} of {args.checkpoint}:")
        print(
            f"top-1 {scores['top1']:.3f} %, top-5 {scores['top5']:.3f} %, loss {scores['loss']:.4f}, "
            f"{scores['images']} images, {scores['images_per_s']:.1f} images/s"
        )
        if args.results_file:
            write_results(results, Path(args.results_file))
    return results


def evaluation_config(
    argv: list[str] | None, args: argparse.Namespace, model: torch.nn.Module, report: LoadReport
) -> dict[str, Any]:
    """Return timm's data config, with the crop of the weights' authors unless set on the command line."""
    config = data_config(args, model)
    crop = published_crop(report.source, config["input_size"][-1])
    if crop is None:
        return config
    # defaults do not override a namespace's values, so what is not None was typed
    typed = build_parser(train=False).parse_known_args(argv, argparse.Namespace(**dict.fromkeys(crop._fields)))[0]
    if typed.crop_pct is not None or typed.crop_mode is not None:
        return config
    config |= {name: value for name, value in crop._asdict().items() if getattr(typed, name) is None}
    LOGGER.info(
        "using the crop of the authors of %s: --crop-pct %s --crop-mode %s (%s); pass these options to override it",
        *(report.source, config["crop_pct"], config["crop_mode"], config["interpolation"]),
    )
    return config


def check_table(path: Path) -> None:
    """Check the columns of an existing results file.

    Raises:
        UserError: They differ from the current ones, or the folder cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror}): pass another --results-file") from error
    if _is_new(path):
        return
    with path.open(newline="") as file:
        try:
            header = list(json.load(file)) if path.suffix == ".json" else next(csv.reader(file), None)
        except (TypeError, ValueError):  # not JSON, or not a dictionary
            header = None
    if header != list(COLUMNS):
        raise UserError(f"{path} has other columns than {', '.join(COLUMNS)}: pass another --results-file")


def write_results(results: dict[str, float | str], path: Path) -> None:
    """Write the results to a .json file, or append them to a .csv file."""
    if path.suffix == ".json":
        part = path.with_name(path.name + ".tmp")
        part.write_text(json.dumps(results, indent=2) + "\n")
        part.replace(path)
        return
    new = _is_new(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(results)


def _is_new(path):
    return not path.exists() or not path.stat().st_size


def main(argv: list[str] | None = None) -> int:
    """Run an evaluation and return the exit code."""
    return run_main("validate.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
