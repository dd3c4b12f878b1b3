"""Which tensors of unknown names must be which of a model's: by their block, their shape, and nothing else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

PLACE = re.compile(r"^(?:.*\.)?\d+(?=\.)")  # a name up to its last number: "stages.0.blocks.1"


def pair_by_structure(
    wanted: Mapping[str, str], given: Mapping[str, str], names: Iterable[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Pair what a model misses with what a checkpoint has left over, where only one pairing is possible.

    Two tensors can be one if they are in the same block, have the same shape, and are both weights or both biases.

    Args:
        wanted: The model's names without a tensor, and their shapes.
        given: The names left over, and their shapes.
        names: All names of the model, which tell its blocks.

    Returns:
        The pairs, from the model's name to the other; and for each name of the model that more than one pairing is
        possible for, the names it could be.
    """
    places = sorted({_place(name) for name in names}, key=len)
    groups: dict[tuple, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, tensors in enumerate((wanted, given)):
        for name, shape in tensors.items():
            place = next((p for p in reversed(places) if name.startswith(f"{p}.")), "")
            groups[place, name.rpartition(".")[2], shape][side].append(name)
    pairs, choices = {}, {}
    for missing, left_over in groups.values():
        if len(missing) == len(left_over) == 1:
            pairs[missing[0]] = left_over[0]
        elif missing and left_over:
            choices |= dict.fromkeys(missing, left_over)
    return pairs, choices


def _place(name: str) -> str:
    match = PLACE.match(name)
    return match[0] if match else ""
