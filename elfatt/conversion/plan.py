"""Plans: the branch of each head in a trained model's attention layers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BRANCHES = ("exact", "linear", "block")


@dataclass(frozen=True)
class Head:
    """Branch of one head.

    Attributes:
        branch: ``exact``: softmax over all tokens; ``linear``: ELFATT's global branch; ``block``: softmax in blocks.
        block: Block side in tokens, for ``block`` only.
        temperature: Divisor of queries and keys in the softmaxes of ``linear``.
        shortcut: Coefficient of V, added to the output of ``linear`` and ``block``.

    Raises:
        ValueError: A value out of range.
    """

    branch: str = "exact"
    block: int = 0
    temperature: float = 1.0
    shortcut: float = 0.0

    def __post_init__(self):
        if self.branch not in BRANCHES:
            raise ValueError(f"branch={self.branch!r} must be one of {', '.join(BRANCHES)}")
        if not isinstance(self.block, int) or (self.branch == "block") != (self.block > 0):
            raise ValueError(
                f"block={self.block!r} must be the block side in tokens for branch 'block', and 0 otherwise"
            )
        if not self.temperature > 0 or (self.temperature != 1 and self.branch != "linear"):
            raise ValueError(f"temperature={self.temperature} must be above 0, and 1 unless branch is 'linear'")
        if self.shortcut and self.branch == "exact":
            raise ValueError(f"shortcut={self.shortcut} must be 0 for branch 'exact'")

    def __str__(self) -> str:
        options = [str(self.block)] if self.block else []
        options += [f"T={self.temperature:g}"] if self.temperature != 1 else []
        options += [f"+{self.shortcut:g}V"] if self.shortcut else []
        return " ".join([self.branch, *options])


@dataclass(frozen=True)
class LayerPlan:
    """Branches of one attention layer's heads.

    Attributes:
        heads: One entry per head.
        min_tokens: Shorter inputs use exact attention in every head.

    Raises:
        ValueError: ``min_tokens`` is not an integer.
    """

    heads: tuple[Head, ...]
    min_tokens: int = 0

    def __post_init__(self):
        if not isinstance(self.min_tokens, int):
            raise ValueError(f"min_tokens={self.min_tokens!r} must be a number of tokens")

    @property
    def is_exact(self) -> bool:
        """Whether all heads are exact."""
        return all(head.branch == "exact" for head in self.heads)

    def without_map(self) -> LayerPlan:
        """Return the plan for tokens that do not form a map: ``block`` heads become exact."""
        heads = tuple(Head() if head.branch == "block" else head for head in self.heads)
        return dataclasses.replace(self, heads=heads)


@dataclass(frozen=True)
class Plan:
    """Plans of one model's attention layers; layers not listed stay exact.

    Attributes:
        model: Name of the model, as given by its adapter.
        layers: Plan of each layer, by name.
        lepe: Add a trainable, zero-initialised LePE to a ViT's converted layers, which adds keys to the state dict.
    """

    model: str
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    lepe: bool = False

    @classmethod
    def uniform(
        cls,
        model: str,
        heads: Mapping[str, int],
        *,
        block: int = 8,
        min_tokens: int = 0,
        global_branch: str = "linear",
    ) -> Plan:
        """Build the paper's ELFATT, without data: in each layer, the first half of the heads is linear, the rest block.

        Args:
            model: Name of the model.
            heads: Number of heads per layer.
            block: Block side in tokens.
            min_tokens: Shorter inputs use exact attention.
            global_branch: Branch of the first half; ``exact`` if linear heads are not supported.
        """
        first, second = (Head(global_branch),), (Head("block", block),)
        return cls(
            model,
            {name: LayerPlan(first * (n // 2) + second * (n - n // 2), min_tokens) for name, n in heads.items()},
        )

    def check(self, model: str, heads: Mapping[str, int]) -> None:
        """Check that the plan fits a model.

        Raises:
            ValueError: The plan is for another model, or its layers or numbers of heads differ.
        """
        if self.model != model:
            raise ValueError(f"the plan was made for {self.model}, not for {model}: calibrate or load another plan")
        for name, layer in self.layers.items():
            if name not in heads:
                raise ValueError(f"the plan has layer {name!r}, which {model} does not have")
            if len(layer.heads) != heads[name]:
                raise ValueError(f"the plan has {len(layer.heads)} heads for {name} but {model} has {heads[name]}")

    def to_json(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            ValueError: The file is not a plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                content["model"],
                {
                    name: LayerPlan(tuple(Head(**head) for head in layer["heads"]), layer["min_tokens"])
                    for name, layer in content["layers"].items()
                },
                bool(content.get("lepe", False)),
            )
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a plan ({type(error).__name__}: {error})") from error

    def __str__(self) -> str:
        """Return one line per layer, with equal heads counted."""
        width = max(map(len, self.layers), default=0)
        lines = [f"plan for {self.model}: {len(self.layers)} layers" + ", with LePE" * self.lepe]
        for name, layer in self.layers.items():
            kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(map(str, layer.heads)).items())
            lines.append(f"  {name:<{width}}  {kinds}" + f"  from {layer.min_tokens} tokens" * (layer.min_tokens > 0))
        return "\n".join(lines)
