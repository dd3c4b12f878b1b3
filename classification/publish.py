"""Publish a run: ``python -m classification.publish RUN_FOLDER --output FOLDER``, or ``--push USER/NAME`` to the Hub.

Exports ``model_best.pth.tar`` (EMA weights if present) in the format of timm's ``local-dir:`` and ``hf-hub:``, with a
model card generated from the run's files.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import nn

import elfatt  # noqa: F401  registers the models with timm
from classification.checkpoint import load
from classification.config import parse_args
from classification.data import data_config
from classification.runtime import build_model, load_weights, read_plan, run_main
from elfatt.data import UserError
from elfatt.hub import Card, push_to_hub, save_pretrained

SHOWN = ("model_kwargs", "img_size", "epochs", "batch_size", "opt", "lr", "weight_decay")
WEIGHTS = {"ema": "averaged (EMA)", "raw": "raw"}


def read_run(folder: Path, results: Path | None = None, license: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a run's best model and its keyword arguments for ``save_pretrained``.

    Args:
        folder: Run folder.
        results: JSON of ``validate.py --results-file`` to use instead of the run's own scores.
        license: License of the weights.

    Raises:
        UserError: A file is missing or invalid.
    """
    options, checkpoint = folder / "args.yaml", folder / "model_best.pth.tar"
    for path in (options, checkpoint):
        if not path.is_file():
            raise UserError(f"{path} is missing: pass the folder of a run that finished an epoch")
    args = parse_args(["--config", str(options)], train=True)
    plan = read_plan(str(folder / "plan.json")) if args.plan else None
    if plan and plan.lepe:
        raise UserError(
            f"{folder} was trained with LePE, which timm's architecture does not support: publish a run without it"
        )
    model = build_model(argparse.Namespace(**{**vars(args), "plan": None}))
    report = load_weights(model, str(checkpoint), use_ema=True)
    labels = report.class_to_idx and sorted(report.class_to_idx, key=report.class_to_idx.get)
    scores = (
        _scores_of(results)
        if results
        else scores_of_epoch(folder / "summary.csv", load(checkpoint)["epoch"], report.weights)
    )
    details = {
        "Architecture": f"`{args.model}`, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters",
        "Weights": WEIGHTS[report.weights],
        **{name.replace("_", " "): getattr(args, name) for name in SHOWN if getattr(args, name) not in (None, {}, "")},
        **scores.pop("details"),
    }
    dataset = args.dataset or Path(args.data_dir).name
    card = Card(details=details, dataset=dataset, license=license, **scores)
    return model, {"card": card, "label_names": labels, "data_config": data_config(args, model), "plan": plan}


def scores_of_epoch(path: Path, epoch: int, weights: str) -> dict[str, Any]:
    """Return an epoch's scores of the ``raw`` or ``ema`` weights.

    Raises:
        UserError: The file has no such scores.
    """
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["epoch"] == str(epoch) and row.get(f"eval_{weights}_top1"):
                found = {name: float(row[f"eval_{weights}_{name}"]) for name in ("top1", "top5")}
                return {**found, "details": {"Best epoch": epoch}}
    raise UserError(f"{path} has no eval_{weights}_top1 of epoch {epoch}: pass --results FILE of validate.py")


def _scores_of(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        details = {"Evaluated on": f"{values['images']} images"}
        return {"top1": float(values["top1"]), "top5": float(values["top5"]), "details": details}
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not the .json of validate.py --results-file ({type(error).__name__}: {error})"
        ) from error


def run(argv: list[str] | None) -> None:
    """Publish a run.

    Raises:
        UserError: Invalid options or run, or a failed upload.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="run folder of train.py")
    add("--output", type=Path, metavar="FOLDER", help="new folder to write")
    add("--push", metavar="USER/NAME", help="repository on the Hugging Face Hub to upload to")
    add("--private", action="store_true", help="make a new repository private")
    add("--results", type=Path, metavar="FILE", help="take the card's scores from this .json of validate.py")
    add("--license", help="license of the weights as named on the Hub, e.g. mit")
    args = parser.parse_args(argv)
    if not args.output and not args.push:
        raise UserError("nothing to do: pass --output FOLDER, --push USER/NAME or both")
    model, options = read_run(args.run, args.results, args.license)
    try:
        if args.output:
            print(f"wrote {save_pretrained(model, args.output, **options)}")
        if args.push:
            print(push_to_hub(model, args.push, private=args.private, **options))
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_main("publish.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
