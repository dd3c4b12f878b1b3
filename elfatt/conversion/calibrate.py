"""Calibration: measure each head's branches on a few batches and choose a plan under a budget.

The error of a layer is ``‖A − S‖ / ‖S‖``: S the output of softmax attention at the tokens of the map, all heads side by
side and before the projection, A what a plan gives for the same queries, keys and values; norms run over all batches.
The error of a plan is the root of the mean of the squared errors of its layers. Where layers were weighed, it is the
root of their weighted sum: the weight of a layer is what its squared error makes of the model's output, measured by
disturbing that layer alone. So the plan's error is that of the output, as far as errors are small and independent.

Either way each head adds its own share, and the choice is one list of steps, each head's cheaper branches in the order
of error per saving; a budget says how far to go. A larger budget takes more of the same steps: its plan is never more
expensive. A budget of cost ends with whichever one step reaches it at the least error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from elfatt.conversion.attention import hybrid_attention
from elfatt.conversion.measures import relative_error
from elfatt.conversion.plan import Head, LayerPlan, Plan

CANDIDATES = (
    *(Head("linear", temperature=temperature) for temperature in (0.5, 1.0, 2.0)),
    *(Head("block", side) for side in (4, 8, 16)),
)


class Attend(Protocol):
    """What a model calls in place of a self-attention layer's softmax attention; arguments as ``hybrid_attention``."""

    def __call__(
        self,
        layer: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        size: tuple[int, int] | None,
        *,
        prefix: int = 0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attend in one layer."""


def multiply_adds(head: Head, size: tuple[int, int], prefix: int, width: int) -> float:
    """Multiply-adds of one head at the tokens of a map, for one image.

    Args:
        head: What it runs.
        size: Height and width of the map in tokens.
        prefix: Tokens before the map.
        width: Channels of the head.
    """
    tokens = size[0] * size[1]
    if head.branch == "linear":
        return width * width * (2 * tokens + prefix)
    keys = tokens if head.branch == "exact" else min(head.block, size[0]) * min(head.block, size[1])
    return 2 * tokens * (keys + prefix) * width


@dataclass
class _Layer:
    """Sums over batches; the tensors are ``[options, heads]``, ``norm`` and ``value`` ``[heads]``."""

    rest: torch.Tensor  # ‖S − A‖²
    overlap: torch.Tensor  # ⟨S − A, V⟩
    norm: torch.Tensor  # ‖S‖²
    value: torch.Tensor  # ‖V‖²
    cost: torch.Tensor  # [options + 1], exact attention last
    probe: float = 0.0  # squared errors of the layer, each time that it was disturbed alone
    effect: float = 0.0  # squared errors of the model's output that came of it


class Calibration:
    """Errors and costs of every head's branches, as measured.

    Args:
        model: Name of the model.
        candidates: Branches to choose from; without a shortcut.
        min_tokens: Shorter inputs stay exact, in the plans as well.
        shortcut: Fit each head's multiple of V by least squares.
        cost: Cost of a head for one image, see ``multiply_adds``.

    Raises:
        ValueError: No candidate, or one that is exact or has a shortcut.
    """

    def __init__(
        self,
        model: str,
        candidates: Sequence[Head] = CANDIDATES,
        *,
        min_tokens: int = 0,
        shortcut: bool = False,
        cost: Callable[[Head, tuple[int, int], int, int], float] = multiply_adds,
    ):
        if not candidates or any(head.branch == "exact" or head.shortcut for head in candidates):
            raise ValueError(f"candidates={tuple(map(str, candidates))} must be linear or block heads without shortcut")
        self.model, self.candidates = model, tuple(candidates)
        self.min_tokens, self.shortcut, self.cost = min_tokens, shortcut, cost
        self.layers: dict[str, _Layer] = {}
        self._disturbed: str | None = None  # the layer that is being weighed

    @torch.no_grad()
    def attend(self, layer, q, k, v, size, *, prefix=0, scale=None) -> torch.Tensor:
        """Measure one call of a layer and return exact attention, so the model runs unchanged."""
        heads = q.shape[2]

        def run(head):
            return hybrid_attention(q, k, v, size, LayerPlan((head,) * heads), prefix=prefix, scale=scale)

        out = run(Head())
        if q.shape[1] < self.min_tokens or self._disturbed not in (None, layer):
            return out
        if self._disturbed == layer:
            found = hybrid_attention(q, k, v, size, self._probe(layer), prefix=prefix, scale=scale)
            self.layers[layer].probe += _squared_error(found[:, prefix:], out[:, prefix:])
            return found
        exact, value = out[:, prefix:].double(), v[:, prefix:].double()
        sums = self.layers.setdefault(layer, self._zeros(heads, q.device))
        sums.norm += exact.square().sum((0, 1, 3))
        sums.value += value.square().sum((0, 1, 3))
        for index, head in enumerate(self.candidates):
            rest = exact - run(head)[:, prefix:].double()
            sums.rest[index] += rest.square().sum((0, 1, 3))
            sums.overlap[index] += (rest * value).sum((0, 1, 3))
        costs = [self.cost(head, size, prefix, q.shape[-1]) for head in (*self.candidates, Head())]
        sums.cost += len(q) * torch.tensor(costs, dtype=torch.float64)
        return out

    @torch.no_grad()
    def weigh(self, call: Callable[[], torch.Tensor], out: torch.Tensor) -> None:
        """Measures what the error of each layer seen so far does to the model's output; one call of it for each.

        Args:
            call: Calls the model again as it was just called, with every self-attention through ``attend``.
            out: What it gave.
        """
        for name, layer in self.layers.items():
            self._disturbed = name
            try:
                layer.effect += _squared_error(call(), out)
            finally:
                self._disturbed = None

    def plan(self, *, error: float | None = None, cost: float | None = None) -> Plan:
        """Choose a branch for each head.

        Args:
            error: Largest error of the plan; the cheapest steps that keep within it.
            cost: Largest share of exact attention's cost; the fewest steps that reach it.

        Raises:
            ValueError: Not one of both, a value out of range, a cost that no choice reaches, or non-finite attention
                output.
        """
        if (error is None) == (cost is None):
            raise ValueError(f"error={error} and cost={cost}: give one of both")
        if (error is not None and not error >= 0) or (cost is not None and not 0 < cost <= 1):
            raise ValueError(f"error={error} must be at least 0, cost={cost} in (0, 1]")
        if not self.layers:
            raise ValueError(f"{self.model}: no self-attention of {self.min_tokens} or more tokens was seen")
        chosen = {name: [len(self.candidates)] * len(layer.norm) for name, layer in self.layers.items()}
        spent, total = 0.0, sum(len(layer.norm) * layer.cost[-1].item() for layer in self.layers.values())
        left = total
        for _, name, head, option, added, saved in self._steps():
            if (error is not None and spent + added > error**2) or (cost is not None and left <= cost * total):
                break
            if cost is not None and left - saved <= cost * total:
                name, head, option, added, saved = self._last_step(chosen, left, cost * total)
            chosen[name][head] = option
            spent, left = spent + added, left - saved
        if cost is not None and left > cost * total:
            raise ValueError(f"cost={cost} cannot be reached: the cheapest choice costs {left / total:.3g}")
        heads = {
            name: [self._head(name, h, option) for h, option in enumerate(options)] for name, options in chosen.items()
        }
        return Plan(self.model, {name: LayerPlan(tuple(row), self.min_tokens) for name, row in heads.items()})

    def error(self, plan: Plan) -> float:
        """The measured error of a plan whose branches are among the candidates."""
        shares = self._shares()
        total = sum(
            shares[name][option, head].item()
            for name, options in self._options(plan).items()
            for head, option in enumerate(options)
        )
        return max(total, 0.0) ** 0.5

    def relative_cost(self, plan: Plan) -> float:
        """The cost of a plan as a share of exact attention's."""
        spent = sum(
            self.layers[name].cost[option].item() for name, options in self._options(plan).items() for option in options
        )
        return spent / sum(len(layer.norm) * layer.cost[-1].item() for layer in self.layers.values())

    def _zeros(self, heads, device):
        options = len(self.candidates)
        rest, overlap, norm, value = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((options, heads), (options, heads), (heads,), (heads,))
        )
        return _Layer(rest, overlap, norm, value, torch.zeros(options + 1, dtype=torch.float64))

    def _shares(self) -> dict[str, torch.Tensor]:
        """What each head adds to the squared error of the plan, by option ``[options + 1, heads]``."""
        shares = {}
        for name, layer in self.layers.items():
            rest = layer.rest
            if not rest.isfinite().all():
                raise ValueError(f"{name}: non-finite attention output: calibrate in float32 or bfloat16")
            if self.shortcut:
                rest = rest - layer.overlap**2 / layer.value.clamp_min(torch.finfo(torch.float64).tiny)
            weight = layer.effect / layer.probe if layer.probe else 1 / len(self.layers)
            rest = torch.cat([rest, torch.zeros_like(rest[:1])]) * (weight / layer.norm.sum())
            shares[name] = rest.cpu()
        return shares

    def _probe(self, name: str) -> LayerPlan:
        """Each head's least error that is one."""
        rest = self.layers[name].rest
        least = rest.masked_fill(rest == 0, torch.inf).min(0)
        heads = zip(least.indices.tolist(), least.values.isinf().tolist(), strict=True)
        return LayerPlan(tuple(Head() if none else self.candidates[option] for option, none in heads))

    def _steps(self) -> list[tuple]:
        """Each head's way down the lower convex hull of error over cost, all heads by error per saving."""
        steps = []
        for name, share in self._shares().items():
            costs = self.layers[name].cost.tolist()
            for head in range(share.shape[1]):
                errors = share[:, head].tolist()
                at = len(costs) - 1
                while True:
                    cheaper = [o for o in range(len(costs)) if costs[o] < costs[at]]
                    if not cheaper:
                        break
                    slope = {o: (errors[o] - errors[at]) / (costs[at] - costs[o]) for o in cheaper}
                    to = min(cheaper, key=lambda o: (slope[o], costs[o]))
                    steps.append((slope[to], name, head, to, errors[to] - errors[at], costs[at] - costs[to]))
                    at = to
        return sorted(steps, key=lambda step: step[0])  # stable: ties go in the order of layers and heads

    def _last_step(self, chosen: dict[str, list[int]], left: float, most: float) -> tuple:
        """The change of one head that brings the cost ``left`` down to ``most`` at the least error."""
        shares, found = self._shares(), []
        for name, options in chosen.items():
            costs = self.layers[name].cost.tolist()
            for head, at in enumerate(options):
                for option, cost in enumerate(costs):
                    if left - (costs[at] - cost) <= most:
                        added = (shares[name][option, head] - shares[name][at, head]).item()
                        found.append((name, head, option, added, costs[at] - cost))
        return min(found, key=lambda step: step[3])

    def _head(self, name: str, head: int, option: int) -> Head:
        if option == len(self.candidates):
            return Head()
        layer, found = self.layers[name], self.candidates[option]
        if not self.shortcut or not layer.value[head]:
            return found
        return dataclasses.replace(found, shortcut=(layer.overlap[option, head] / layer.value[head]).item())

    def _options(self, plan: Plan) -> dict[str, list[int]]:
        def option(name, head):
            if head.branch == "exact":
                return len(self.candidates)
            bare = dataclasses.replace(head, shortcut=0.0)
            if bare not in self.candidates:
                raise ValueError(
                    f"{name}: '{head}' was not measured; the candidates are {', '.join(map(str, self.candidates))}"
                )
            return self.candidates.index(bare)

        return {name: [option(name, head) for head in layer.heads] for name, layer in plan.layers.items()}


def _squared_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return relative_error(found.double().reshape(1, -1), exact.double().reshape(1, -1)).item() ** 2


def calibrate(
    name: str,
    run: Callable[[object, Attend], object],
    batches: Iterable,
    *,
    error: float | None = None,
    cost: float | None = None,
    **options,
) -> Plan:
    """Calibrate a trained model on a few batches and choose a plan; see ``Calibration``.

    Args:
        name: Name of the model.
        run: Runs the model on a batch, with every self-attention through the given ``Attend``.
        batches: What ``run`` takes.
        error: Largest error of the plan, or
        cost: largest share of exact attention's cost.
        **options: Of ``Calibration``.

    Raises:
        ValueError: As ``Calibration.plan``.
    """
    calibration = Calibration(name, **options)
    for batch in batches:
        run(batch, calibration.attend)
    return calibration.plan(error=error, cost=cost)
