"""Distil a ViT into its converted copy: ``python -m classification.distill --plan FILE --initial-checkpoint FILE ...``.

The student starts from the teacher's weights. In the first half of the epochs, each converted attention layer is fed
the teacher's input and trained to match its output; in the second half, the logits are matched. Labels are not used.
All other options are those of ``train.py``.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.config import parse_args
from classification.runtime import build_model, load_weights, read_plan, run_main
from classification.train import Trainer
from elfatt.data import UserError
from elfatt.integrations.timm import vit_of


class Distiller(Trainer):
    """Trainer whose loss is the distance to a teacher.

    Args:
        args: Parsed options of ``train.py``.

    Raises:
        UserError: No plan or no teacher; otherwise see ``Trainer``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if not args.plan or not args.initial_checkpoint:
            raise UserError(
                "pass --plan FILE (see classification/calibrate.py) and the teacher's --initial-checkpoint FILE"
            )
        plan = read_plan(args.plan)
        names = [name for name, layer in plan.layers.items() if not layer.is_exact]
        if plan.lepe:  # the teacher has none
            args.allow_mismatch = [*(args.allow_mismatch or ()), *(f"{name}.lepe." for name in names)]
        super().__init__(args)
        teacher = build_model(argparse.Namespace(**{**vars(args), "plan": None}))
        load_weights(teacher, args.initial_checkpoint, use_ema=True)
        self.teacher = teacher.requires_grad_(False).eval().to(self.world.device, memory_format=self.memory_format)
        self.inputs: dict[str, tuple] = {}  # of the teacher's layers
        self.targets: dict[str, Tensor] = {}  # outputs of the teacher's layers
        self.outputs: dict[str, Tensor] = {}  # outputs of the student's layers
        self.feeding = False  # feed the teacher's inputs to the student's layers
        ours, theirs = vit_of(self.model).layers, vit_of(teacher).layers
        for name in names:
            theirs[name].register_forward_pre_hook(partial(self._keep_input, name), with_kwargs=True)
            theirs[name].register_forward_hook(partial(_keep_output, self.targets, name))
            ours[name].register_forward_pre_hook(partial(self._feed, name), with_kwargs=True)
            ours[name].register_forward_hook(partial(_keep_output, self.outputs, name))

    def _keep_input(self, name, layer, args, kwargs):
        self.inputs[name] = args, kwargs

    def _feed(self, name, layer, args, kwargs):
        if not self.feeding:
            return None
        (x, *rest), options = self.inputs[name]
        return (x + 0 * args[0], *rest), options  # DDP needs a gradient for every weight

    def compute_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the relative squared error of the attention outputs, or the KL divergence of the logits."""
        with torch.no_grad():
            wanted = self.teacher(images)
        self.feeding = 2 * self.state.epoch < self.num_epochs
        found = self.net(images)
        if not self.feeding:
            return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
        self.feeding = False
        errors = [
            (self.outputs[name] - target).float().square().sum() / target.float().square().sum()
            for name, target in self.targets.items()
        ]
        return torch.stack(errors).mean() + 0 * found.sum()  # DDP, as above


def _keep_output(outputs, name, layer, args, out):
    outputs[name] = out


def main(argv: list[str] | None = None) -> int:
    """Run a distillation and return the exit code."""
    return run_main("distill.py", lambda: Distiller(parse_args(argv, train=True)).fit())


if __name__ == "__main__":
    sys.exit(main())
