"""Aligns a converted ViT with the model it was: `python classification/distill.py --plan FILE ...`.

The teacher is the model of `--initial-checkpoint` with its own attention, the student the same weights with the plan's.
In the first half of the epochs the outputs of the converted attention layers are matched, layer by layer; in the second
half the logits. Labels are not used. All other options are those of `train.py`, `--resume auto` among them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.config import parse_args
from classification.runtime import build_model, load_weights, run_main
from classification.train import Trainer
from elfatt.conversion import Plan
from elfatt.data import UserError
from elfatt.integrations.timm import vit_of


class Distiller(Trainer):
    """One alignment of a student with its teacher.

    Args:
        args: Parsed options of `train.py`.

    Raises:
        UserError: As `Trainer`; no plan, or no weights to start from.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if not args.plan or not args.initial_checkpoint:
            raise UserError(
                "give --plan FILE (classification/calibrate.py) and the teacher's --initial-checkpoint FILE"
            )
        super().__init__(args)
        teacher = build_model(argparse.Namespace(**{**vars(args), "plan": None}))
        load_weights(teacher, args.initial_checkpoint, use_ema=True)
        self.teacher = teacher.requires_grad_(False).eval().to(self.world.device, memory_format=self.memory_format)
        layers = [name for name, layer in Plan.from_json(args.plan).layers.items() if not layer.is_exact]
        self.outputs, self.targets = (_record(vit_of(m).layers, layers, m.training) for m in (self.model, teacher))

    def compute_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Relative squared error of the attention layers' outputs, or Kullback-Leibler divergence of the logits."""
        self.outputs.clear()
        self.targets.clear()
        with torch.no_grad():
            wanted = self.teacher(images)
        found = self.net(images)
        if 2 * self.state.epoch >= self.num_epochs:
            return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
        pairs = zip(self.outputs, self.targets, strict=True)
        errors = [(out - target).float().square().sum() / target.float().square().sum() for out, target in pairs]
        return torch.stack(errors).mean() + 0 * found.sum()  # DDP wants a gradient of every weight


def _record(layers: dict[str, nn.Module], names: Iterable[str], training: bool) -> list[Tensor]:
    """A list that takes the outputs of these layers in every forward pass in training mode, or in evaluation mode."""
    outputs: list[Tensor] = []

    def keep(layer, _, out):
        if layer.training == training:
            outputs.append(out)

    for name in names:
        layers[name].register_forward_hook(keep)
    return outputs


def main(argv: list[str] | None = None) -> int:
    """Runs an alignment; returns the exit code."""
    return run_main("distill.py", lambda: Distiller(parse_args(argv, train=True)).fit())


if __name__ == "__main__":
    sys.exit(main())
