"""Match unrecognised checkpoint modules by block and shape."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

PLACE = re.compile(r"^(?:.*\.)?\d+(?=\.)")  # name up to its last number: "stages.0.blocks.1"


def pair_by_structure(
    wanted: Mapping[str, str], given: Mapping[str, str], names: Iterable[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Pair a model's missing tensors with a checkpoint's unused ones if the pairing is unique.

    Modules match if they are in the same block and have the same parameter names and shapes, e.g. a weight
    ``[8, 1, 3, 3]`` and a bias ``[8]``.

    Args:
        wanted: Shapes of the model's missing tensors, by name.
        given: Shapes of the checkpoint's unused tensors, by name.
        names: All tensor names of the model; they define its blocks.

    Returns:
        Pairs from the model's to the checkpoint's names, and the candidates for each ambiguous module of the model.
    """
    places = sorted({match[0] for match in map(PLACE.match, names) if match}, key=len, reverse=True)
    groups: dict[tuple, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, tensors in enumerate((wanted, given)):
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name, shape in tensors.items():
            module, _, kind = name.rpartition(".")
            modules[module][kind] = shape
        for module, shapes in modules.items():
            place = next((place for place in places if f"{module}.".startswith(f"{place}.")), "")
            groups[place, frozenset(shapes.items())][side].append(module)
    pairs: dict[str, str] = {}
    choices: dict[str, list[str]] = {}
    for (_, shapes), (missing, left_over) in groups.items():
        if len(missing) == len(left_over) == 1:
            pairs |= {f"{missing[0]}.{kind}": f"{left_over[0]}.{kind}" for kind, _ in shapes}
        elif missing and left_over:
            choices |= dict.fromkeys(missing, left_over)
    return pairs, choices
