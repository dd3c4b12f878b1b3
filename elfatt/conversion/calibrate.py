"""Calibration: measure each head's branches on a few batches and choose a plan under a budget.

A layer's error is ``‖A − S‖ / ‖S‖``, where S is the output of softmax attention at the map's tokens, with all heads
concatenated and before the projection, and A is the plan's output for the same queries, keys and values; norms are over
all batches. A plan's error is the root mean square of its layers' errors. If layers were weighed, it is the root of the
weighted sum of squares instead: a layer's weight relates its squared error to that of the model's output, measured by
perturbing only that layer. The plan's error then estimates the output's, if errors are small and independent.

Either way the squared error is a sum over heads, so the choice is one list of steps: each head's cheaper branches,
ordered by error per saving. The budget decides how many are taken; a larger error budget takes more of the same steps,
so its plan never costs more. Under a cost budget, the last step is the single one that meets it with the least error.
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
    """Replacement for a layer's softmax self-attention; arguments as in ``hybrid_attention``."""

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
        """Compute the attention of one layer."""


def multiply_adds(head: Head, size: tuple[int, int], prefix: int, width: int) -> float:
    """Return the multiply-adds of one head at a map's tokens, per image.

    Args:
        head: The head's branch.
        size: Map height and width in tokens.
        prefix: Number of tokens before the map.
        width: Channels per head.
    """
    tokens = size[0] * size[1]
    if head.branch == "linear":
        return width * width * (2 * tokens + prefix)
    keys = tokens if head.branch == "exact" else min(head.block, size[0]) * min(head.block, size[1])
    return 2 * tokens * (keys + prefix) * width


@dataclass
class _Layer:
    """Sums over batches; tensors are ``[options, heads]``, ``norm`` and ``value`` ``[heads]``."""

    rest: torch.Tensor  # ‖S − A‖²
    overlap: torch.Tensor  # ⟨S − A, V⟩
    norm: torch.Tensor  # ‖S‖²
    value: torch.Tensor  # ‖V‖²
    cost: torch.Tensor  # [options + 1], exact attention last
    probe: float = 0.0  # squared errors of the layer when only it is perturbed
    effect: float = 0.0  # resulting squared errors of the model's output


class Calibration:
    """Measured errors and costs of every head's branches.

    Args:
        model: Name of the model.
        candidates: Branches to choose from, without shortcuts.
        min_tokens: Shorter inputs stay exact, also in the resulting plans.
        shortcut: Fit each head's coefficient of V by least squares.
        cost: Cost of a head per image; see ``multiply_adds``.

    Raises:
        ValueError: No candidates, or one that is exact or has a shortcut.
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
        self._disturbed: str | None = None  # layer being weighed

    @torch.no_grad()
    def attend(self, layer, q, k, v, size, *, prefix=0, scale=None) -> torch.Tensor:
        """Measure one call of a layer and return exact attention, so that the model runs unchanged."""
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
        """Measure how each layer's error affects the model's output, with one call of the model per layer.

        Args:
            call: Repeats the last call of the model, with all self-attention through ``attend``.
            out: Output of that call.
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
            error: Maximum error of the plan; takes steps until it would be exceeded.
            cost: Maximum cost as a fraction of exact attention's; takes steps until it is met.

        Raises:
            ValueError: Not exactly one budget, a value out of range, an unreachable cost, or non-finite output.
        """
        if (error is None) == (cost is None):
            raise ValueError(f"error={error} and cost={cost}: pass exactly one of them")
        if error is not None and not error >= 0:
            raise ValueError(f"error={error} must be at least 0")
        if cost is not None and not 0 < cost <= 1:
            raise ValueError(f"cost={cost} (the budget) must be in (0, 1]")
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
        """Return the measured error of a plan made of candidates."""
        shares = self._shares()
        total = sum(
            shares[name][option, head].item()
            for name, options in self._options(plan).items()
            for head, option in enumerate(options)
        )
        return max(total, 0.0) ** 0.5

    def relative_cost(self, plan: Plan) -> float:
        """Return a plan's cost as a fraction of exact attention's."""
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
        """Return each head's contribution to the plan's squared error, by option: ``[options + 1, heads]``."""
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
        """Return a plan with each head's smallest nonzero error."""
        rest = self.layers[name].rest
        least = rest.masked_fill(rest == 0, torch.inf).min(0)
        heads = zip(least.indices.tolist(), least.values.isinf().tolist(), strict=True)
        return LayerPlan(tuple(Head() if none else self.candidates[option] for option, none in heads))

    def _steps(self) -> list[tuple]:
        """Return steps down each head's lower convex hull of error over cost, sorted by error per saving."""
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
        return sorted(steps, key=lambda step: step[0])  # stable: ties keep the order of layers and heads

    def _last_step(self, chosen: dict[str, list[int]], left: float, most: float) -> tuple:
        """Return the change of one head that lowers the cost from ``left`` to ``most`` at the least error."""
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
    """Calibrate a trained model on a few batches and return a plan; see ``Calibration``.

    Args:
        name: Name of the model.
        run: Runs the model on a batch, with all self-attention through the given ``Attend``.
        batches: Inputs for ``run``.
        error: Maximum error of the plan; or
        cost: maximum cost as a fraction of exact attention's.
        **options: Options of ``Calibration``.

    Raises:
        ValueError: As in ``Calibration.plan``.
    """
    calibration = Calibration(name, **options)
    for batch in batches:
        run(batch, calibration.attend)
    return calibration.plan(error=error, cost=cost)
