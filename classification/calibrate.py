"""Calibrate an attention plan for a trained ViT: ``python -m classification.calibrate --save-plan FILE ...``.

Pass the plan to ``validate.py``, ``train.py`` or ``distill.py`` as ``--plan``. It is calibrated on training images to
keep a given share of attention's multiply-adds; with ``--uniform`` it is the paper's ELFATT. See docs/pretrained.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import IterableDataset, Subset
from tqdm import tqdm

import elfatt
from classification.config import parse_args
from classification.data import BrokenImages, Loader, data_config
from classification.runtime import build_model, init_world, load_weights, run_main
from classification.splits import open_split
from elfatt.data import UserError
from elfatt.integrations.timm import calibrate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``validate.py`` does not have."""
    parser.prog = "calibrate.py"
    add = parser.add_argument_group("plan").add_argument
    add("--save-plan", type=Path, required=True, metavar="FILE", help="JSON file to write")
    add("--budget", type=float, default=0.5, help="maximum share of attention's multiply-adds to keep")
    add("--images", type=int, default=64, help="number of random images to calibrate on")
    add("--split", default="train", help="split to draw them from")
    add("--uniform", action="store_true", help="write the uniform plan, which needs no images")
    add("--block", type=int, default=8, help="block size of the uniform plan in tokens")
    add("--lepe", action="store_true", help="add LePE to each converted layer, to be trained with distill.py")


def run(argv: list[str] | None) -> None:
    """Calibrate and write a plan.

    Raises:
        UserError: Invalid data, options, checkpoint or model.
    """
    args = parse_args(argv, train=False, extend=add_arguments)
    world = init_world(args.device, args.backend)
    model = build_model(args)
    load_weights(model, args.checkpoint, use_ema=args.use_ema)
    try:
        if args.uniform:
            plan = elfatt.convert(model, block=args.block).plan
        else:
            args.val_split = args.split
            dataset = open_split(args, train=False)
            if not isinstance(dataset, IterableDataset):  # the first images would all be of one class
                chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
                dataset = Subset(dataset, chosen[: args.images].tolist())
            loader = Loader(dataset, args, data_config(args, model), world, BrokenImages(0), train=False)
            loader.seek(0)
            count = -(-args.images // loader.batch_size)
            batches = tqdm(islice(loader, count), "calibrating", count, disable=None, leave=False)
            found = calibrate(model.to(world.device), (images for images, _ in batches))
            plan = found.plan(cost=args.budget)
            print(f"error {found.error(plan):.4f} at {found.relative_cost(plan):.1%} of attention's multiply-adds")
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    args.save_plan.parent.mkdir(parents=True, exist_ok=True)
    plan = dataclasses.replace(plan, lepe=args.lepe)
    plan.to_json(args.save_plan)
    print(plan)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_main("calibrate.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
