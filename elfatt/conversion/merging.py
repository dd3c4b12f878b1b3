"""Token merging: merge the most similar tokens before a layer and unmerge them after it.

Source: ToMe for Stable Diffusion (Bolya and Hoffman, arXiv 2303.17604; github.com/dbolya/tomesd).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

MAX_RATIO = 0.75  # each 2 × 2 cell keeps one token


class Tokens(NamedTuple):
    """The merging of one layer's tokens in one call.

    Attributes:
        merge: Merges tokens ``[B, N, C]`` before the layer.
        unmerge: Unmerges them after it.
        attend: An ``Attend`` for the merged tokens, if they need their own.
    """

    merge: Callable[[torch.Tensor], torch.Tensor]
    unmerge: Callable[[torch.Tensor], torch.Tensor]
    attend: Callable[..., torch.Tensor] | None = None


class Merge(Protocol):
    """Token merging before the self-attention layers of a model's largest map."""

    def __call__(self, x: torch.Tensor, size: tuple[int, int], done: float, generator: torch.Generator) -> Tokens:
        """Match a layer's tokens.

        Args:
            x: Input of the layer's block, ``[B, H · W, C]``.
            size: Map height and width in tokens.
            done: Fraction of steps done.
            generator: Draws the destinations.
        """


class TokenMerging:
    """ToMe by the tomesd package: a fraction of tokens is merged into the most similar ones, one per 2 × 2 cell.

    Args:
        ratio: Fraction of tokens to merge, at most 0.75.

    Raises:
        ImportError: tomesd is not installed.
        ValueError: A ratio out of range.
    """

    def __init__(self, ratio: float):
        if not 0 <= ratio <= MAX_RATIO:
            raise ValueError(f"merge_ratio={ratio} must be from 0 to {MAX_RATIO}, the limit for 2 × 2 cells")
        try:
            import tomesd  # noqa: F401
        except ImportError as error:
            raise ImportError(f"merge_ratio={ratio} needs tomesd: pip install tomesd") from error
        self.ratio = ratio

    def __call__(self, x: torch.Tensor, size: tuple[int, int], done: float, generator: torch.Generator) -> Tokens:
        """Match tokens by similarity; see ``Merge``."""
        from tomesd import merge as matching

        merge, unmerge = matching.bipartite_soft_matching_random2d(
            x,
            *size[::-1],
            *(2, 2),
            int(x.shape[1] * self.ratio),
            no_rand=len(x) % 2 == 1,  # as in tomesd: otherwise guidance's halves would differ
            generator=generator,
        )
        return Tokens(merge, unmerge)


class Matching:
    """Matching of tokens, of which any number can be merged.

    One token per cell of the map is a destination; the others are partnered with their most similar destination and
    merged in order of similarity. Merged sequences are ordered ``[kept, destinations]``.

    Args:
        x: Tokens to compare, ``[B, H · W, C]``.
        size: Map height and width in tokens.
        stride: Cell side in tokens.
        generator: Draws the destinations; without it, each cell's first token is used.
    """

    def __init__(self, x: torch.Tensor, size: tuple[int, int], stride: int, generator: torch.Generator | None = None):
        (height, width), self.tokens = size, x.shape[1]
        cells = height // stride, width // stride
        if generator is None:
            place = torch.zeros(cells, dtype=torch.long, device=x.device)
        else:
            place = torch.randint(stride**2, cells, generator=generator, device=generator.device).to(x.device)
        row, column = (stride * torch.arange(n, device=x.device) for n in cells)
        index = (row[:, None] + place // stride) * width + column + place % stride
        kind = torch.ones(self.tokens, dtype=torch.long, device=x.device).scatter(0, index.flatten(), 0)
        order = kind.argsort(stable=True)
        self.destinations, rest = order[: index.numel()], order[index.numel() :]
        with torch.no_grad():
            x = F.normalize(x, dim=-1)
            likeness, partner = (x[:, rest] @ x[:, self.destinations].mT).max(dim=-1)
            nearest = likeness.argsort(dim=-1, descending=True)
        self.rest, self.partner = rest[nearest], partner.gather(1, nearest)  # [B, N - destinations], most similar first

    def merge(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Merge ``count`` tokens by averaging: ``[B, N - count, C]``."""
        rest = x.gather(1, _wide(self.rest, x))
        means = x[:, self.destinations].scatter_reduce(1, _wide(self.partner[:, :count], x), rest[:, :count], "mean")
        return torch.cat([rest[:, count:], means], dim=1)

    def unmerge(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Copy each merged token's value back to it: ``[B, N, C]``."""
        kept, means = x.split([self.rest.shape[1] - count, len(self.destinations)], dim=1)
        rest = torch.cat([means.gather(1, _wide(self.partner[:, :count], x)), kept], dim=1)
        out = x.new_empty(x.shape[0], self.tokens, x.shape[2])
        out[:, self.destinations] = means
        return out.scatter(1, _wide(self.rest, x), rest)

    def merge_further(self, x: torch.Tensor, count: int, further: int) -> torch.Tensor:
        """Continue merging from ``count`` to ``further`` merged tokens."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # sums over many tokens
        kept, means = wide.split([self.rest.shape[1] - count, len(self.destinations)], dim=1)
        sums = (means * self._weights(count, wide)).scatter_add(
            1, _wide(self.partner[:, count:further], x), kept[:, : further - count]
        )
        return torch.cat([kept[:, further - count :], sums / self._weights(further, wide)], dim=1).to(x.dtype)

    def _weights(self, count: int, x: torch.Tensor) -> torch.Tensor:
        """Return the number of tokens merged into each destination, itself included: ``[B, destinations, 1]``."""
        ones = x.new_ones(len(self.partner), len(self.destinations))
        merged = self.partner[:, :count]
        return ones.scatter_add(1, merged, ones.new_ones(merged.shape))[..., None]


def _wide(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])
