"""Chooses the attention of a trained ViT: `python classification/calibrate.py --config FILE --data-dir FOLDER ...`.

Writes a plan for `--plan` of `validate.py`, `train.py` and `distill.py`: calibrated on images of the training split to
a share of attention's multiply-adds, or with `--uniform` the paper's ELFATT. See docs/pretrained.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import torch
from torch.utils.data import IterableDataset, Subset
from tqdm import tqdm

import elfatt
from classification.config import build_parser, parse_args
from classification.data import BrokenImages, Loader, data_config
from classification.runtime import build_model, init_world, load_weights, run_main
from classification.splits import open_split
from elfatt.data import UserError
from elfatt.integrations.timm import calibrate


def run(argv: list[str] | None) -> None:
    """Writes the plan that the options ask for.

    Raises:
        UserError: Anything the user can correct: data, options, checkpoint, model.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--save-plan", type=Path, required=True, metavar="FILE", help="JSON to write")
    own.add_argument("--budget", type=float, default=0.5, help="share of attention's multiply-adds that may remain")
    own.add_argument("--images", type=int, default=64, help="images to calibrate on, chosen at random")
    own.add_argument("--split", default="train", help="split that they are from")
    own.add_argument("--uniform", action="store_true", help="half the heads linear, half in blocks, without data")
    own.add_argument("--block", type=int, default=8, help="side of the uniform plan's blocks in tokens")
    own.add_argument("--lepe", action="store_true", help="add a LePE to each replaced layer, for distill.py to train")
    if argv is None:
        argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        own.print_help()
        print("\nand the options of validate.py:\n")
        build_parser(train=False).print_help()
        return
    options, rest = own.parse_known_args(argv)
    args = parse_args(rest, train=False)
    world = init_world(args.device, args.backend)
    model = build_model(args)
    load_weights(model, args.checkpoint, use_ema=args.use_ema)
    try:
        if options.uniform:
            plan = elfatt.convert(model, block=options.block).plan
        else:
            args.val_split = options.split
            dataset = open_split(args, train=False)
            if not isinstance(dataset, IterableDataset):  # in order they would be of one class
                chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
                dataset = Subset(dataset, chosen[: options.images].tolist())
            loader = Loader(dataset, args, data_config(args, model), world, BrokenImages(0), train=False)
            loader.seek(0)
            count = -(-options.images // loader.batch_size)
            batches = tqdm(islice(loader, count), "calibrating", count, disable=None, leave=False)
            found = calibrate(model.to(world.device), (images for images, _ in batches))
            plan = found.plan(cost=options.budget)
            print(f"error {found.error(plan):.4f} at {found.relative_cost(plan):.1%} of attention's multiply-adds")
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    options.save_plan.parent.mkdir(parents=True, exist_ok=True)
    plan = dataclasses.replace(plan, lepe=options.lepe)
    plan.to_json(options.save_plan)
    print(plan)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run_main("calibrate.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
