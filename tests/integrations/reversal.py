"""Conversions applied and removed in any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch


def check_orders(
    run: Callable[[], torch.Tensor],
    apply: Callable,
    plans: Sequence,
    check_clean: Callable[[], None],
    orders: int = 20,
) -> None:
    """The plan applied last alone is in effect, and nothing is left once all are removed.

    Args:
        run: Runs the model.
        apply: Applies a plan and returns a handle.
        plans: Plans with different outputs.
        check_clean: Compares the model with its original state.
        orders: Number of random sequences.
    """
    before, wanted = run(), []
    for plan in plans:
        with apply(plan):
            wanted.append(run())
    chance = random.Random(0)
    for _ in range(orders):
        handles, live = [], None
        for _ in range(chance.randint(1, 5)):
            if handles and chance.random() < 0.5:
                gone = chance.choice(handles)
                gone.remove()
                live = None if live and live[0] is gone else live
            else:
                index = chance.randrange(len(plans))
                handles.append(apply(plans[index]))
                live = handles[-1], index
        assert torch.equal(run(), wanted[live[1]] if live else before)
        for handle in chance.sample(handles, len(handles)):
            handle.remove()
        assert torch.equal(run(), before)
        check_clean()
