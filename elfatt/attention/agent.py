"""Agent attention (arXiv 2312.08874, official agent_swin.py and agent_cswin.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from elfatt.attention.base import QKVAttention, check_positive, unpack
from elfatt.attention.registry import register_attention
from elfatt.layers.lepe import add_called, filter_of, make_lepe
from elfatt.layers.positions import resize_positions
from elfatt.ops import add_lepe, agent_attention

GRID = 7  # side of the coarse bias maps, as published


@register_attention("agent")
class AgentAttention(QKVAttention):
    """Agent attention, linear in the number of tokens.

    The 3×3 depthwise convolution on V is Swin-Agent's ``dwc`` and CSWin-Agent's LePE.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        agents: Side of the agent grid, of ``agents²`` agents.
        feat_size: Training map height and width in tokens; biases are resized bilinearly for other maps.
        tables: Agent grid side of the stored biases (default: ``agents``), which are resized bilinearly to ``agents``
            as in the official dense models (downstream/, agent_swin.py).
        lepe: Add the convolution on V.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.

    Raises:
        ValueError: ``agents``, ``tables`` or ``feat_size`` below 1.
    """

    shown = ("agents",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agents: int = 7,
        feat_size: tuple[int, int] = (14, 14),
        tables: int | None = None,
        lepe: bool = True,
        backend: str | None = None,
    ):
        super().__init__(dim, num_heads, backend=backend)
        height, width = feat_size
        tables = agents if tables is None else tables
        check_positive(agents=agents, tables=tables, feat_height=height, feat_width=width)
        self.agents, self.tables = agents, tables
        heads, n = num_heads, tables**2
        self.an_bias = nn.Parameter(torch.empty(heads, n, GRID, GRID))
        self.na_bias = nn.Parameter(torch.empty(heads, n, GRID, GRID))
        self.ah_bias = nn.Parameter(torch.empty(heads, n, height, 1))
        self.aw_bias = nn.Parameter(torch.empty(heads, n, 1, width))
        self.ha_bias = nn.Parameter(torch.empty(heads, height, 1, n))
        self.wa_bias = nn.Parameter(torch.empty(heads, 1, width, n))
        for bias in (self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias):
            nn.init.trunc_normal_(bias, std=0.02)
        self.lepe = make_lepe(dim) if lepe else None

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map packed ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        q, k, v = unpack(qkv).unbind(3)
        size = q.shape[1:3]
        gather = self._bias(self.an_bias, self.ah_bias + self.aw_bias, size)
        broadcast = self._bias(self.na_bias, (self.ha_bias + self.wa_bias).permute(0, 3, 1, 2), size)
        out = agent_attention(
            q,
            k,
            v,
            num_heads=self.num_heads,
            agents=self.agents,
            gather_bias=gather,
            broadcast_bias=broadcast.transpose(1, 2),
            backend=self.backend,
        )
        return add_called(add_lepe(out, v, filter_of(self.lepe), backend=self.backend), v, self.lepe)

    def _bias(self, grid: torch.Tensor, axes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return the sum of coarse and axial biases at full resolution: ``[heads, agents², H * W]``."""
        return self._resize(grid, size) + self._resize(axes, size)

    def _resize(self, table: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Resize ``[heads, tables², h, w]``, first the map, then the agent grid: ``[heads, agents², H * W]``."""
        table = resize_positions(table, size, "bilinear").flatten(2).transpose(1, 2)
        table = resize_positions(table.unflatten(2, (self.tables, self.tables)), 2 * (self.agents,), "bilinear")
        return table.flatten(2).transpose(1, 2)
