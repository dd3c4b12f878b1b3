"""Base classes of attention mechanisms: packed qkv projection, attention, output projection."""

from __future__ import annotations

import torch
from torch import nn

from elfatt.layers.lepe import make_lepe
from elfatt.ops.dispatch import check_backend


class QKVAttention(nn.Module):
    """Attention as ``proj(attend(qkv(x)))``; subclasses implement ``attend``.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide ``dim``.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``backend`` is unknown; in ``forward``, the input is not
            ``[B, H, W, dim]``.
    """

    shown: tuple[str, ...] = ()  # attributes shown by print(), besides the heads

    def __init__(self, dim: int, num_heads: int, *, backend: str | None = None):
        super().__init__()
        if backend is not None:
            check_backend(backend)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} cannot be split into num_heads={num_heads}: choose a divisor of {dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over a map ``[B, H, W, C]`` of any height and width."""
        self.check_map(x)
        return self.proj(self.attend(self.qkv(x)))

    def check_map(self, x: torch.Tensor) -> None:
        """Raise ``ValueError`` unless the input is ``[B, H, W, C]``."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"expected a map [B, H, W, {self.dim}], got {tuple(x.shape)}")

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return heads and options for ``print(model)``."""
        names = ("num_heads", *self.shown, *(("backend",) if self.backend else ()))
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class LePEAttention(QKVAttention):
    """Attention with one branch over all channels, and LePE.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        lepe: Add LePE.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.
    """

    def __init__(self, dim: int, num_heads: int, *, lepe: bool = True, backend: str | None = None):
        super().__init__(dim, num_heads, backend=backend)
        self.lepe = make_lepe(dim) if lepe else None


def unpack(qkv: torch.Tensor) -> torch.Tensor:
    """View packed ``[B, H, W, 3C]`` as ``[B, H, W, 3, C]``."""
    return qkv.unflatten(-1, (3, -1))


def check_positive(**values: int) -> None:
    """Raise ``ValueError`` for the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
