"""VMamba (arXiv 2401.10166): blocks that scan the map along rows and columns in both directions.

Follows the official ``vmamba.py`` (MzeroMiko/VMamba) with ``forward_type="v05_noz"``: no gate, no projection biases.
``SS2D`` keeps the official names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn

from elfatt.backbones.hierarchical import HierarchicalBackbone
from elfatt.layers import ConvMerge, DoubleStem
from elfatt.layers.lepe import convolve
from elfatt.ops import selective_scan
from elfatt.ops.dispatch import check_backend

PATHS = 4  # rows, columns, rows reversed, columns reversed
STEPS = (0.001, 0.1)  # initial range of the scan's step size δ


@register_notrace_module  # a torch.fx leaf, as its code depends on the map's size
class SS2D(nn.Module):
    """2D selective scan (section 4.2): depthwise convolution, then the sum of four scans.

    Args:
        dim: Channels C.
        ratio: Expansion ratio of the scanned channels.
        states: States N per scanned channel.
        backend: One of ``elfatt.ops.BACKENDS``; None for the active one.
    """

    def __init__(self, dim: int, *, ratio: float = 1.0, states: int = 1, backend: str | None = None):
        super().__init__()
        if backend is not None:
            check_backend(backend)
        self.backend = backend
        inner, self.rank, self.states = int(ratio * dim), math.ceil(dim / 16), states
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        # per path: projection to low-rank steps, B and C; from low-rank steps to a step per channel
        self.x_proj_weight = nn.Parameter(torch.empty(PATHS, self.rank + 2 * states, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(PATHS, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(PATHS, inner))
        self.A_logs = nn.Parameter(torch.empty(PATHS * inner, states))
        self.Ds = nn.Parameter(torch.empty(PATHS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as in Mamba: A is -1, -2, … per state, D is 1, and steps are log-uniform."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        self.x_proj_weight.uniform_(-bound, bound)
        self.dt_projs_weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
        self.dt_projs_bias.uniform_(*(math.log(step) for step in STEPS))
        step = self.dt_projs_bias.exp()
        self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_logs.copy_(torch.arange(1, self.states + 1, device=self.A_logs.device).log().expand_as(self.A_logs))
        self.Ds.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix a map ``[B, H, W, C]`` of any height and width."""
        x = F.silu(convolve(self.conv2d, self.in_proj(x), backend=self.backend))
        paths = cross_scan(x)
        projected = torch.einsum("bkld,krd->bklr", paths, self.x_proj_weight)
        step, b, c = projected.split([self.rank, self.states, self.states], dim=-1)
        step = torch.einsum("bklr,kdr->bkld", step, self.dt_projs_weight)
        delta = F.softplus(step + self.dt_projs_bias[:, None])
        a, d = -self.A_logs.exp(), self.Ds
        a, d = (t.unflatten(0, (PATHS, -1)) for t in (a, d))
        y = selective_scan(paths, delta, a, b, c, d, backend=self.backend)
        # keep the scan's float32 if the norm's weights allow it
        y = cross_merge(y, x.shape[1:3]).to(self.out_norm.weight.dtype)
        return self.out_proj(self.out_norm(y).to(x.dtype))


def cross_scan(x: torch.Tensor) -> torch.Tensor:
    """Unroll a map ``[B, H, W, D]`` along four paths: ``[B, 4, H·W, D]``."""
    ahead = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)], 1)
    return torch.cat([ahead, ahead.flip(2)], 1)


def cross_merge(y: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Sum four paths ``[B, 4, H·W, D]`` on a map ``[B, H, W, D]`` of this size."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(2)).unbind(1)
    return rows.unflatten(1, size) + columns.unflatten(1, size[::-1]).transpose(1, 2)


class VMamba(HierarchicalBackbone):
    """VMamba with convolutional stem and downsampling, for any image size.

    Args:
        in_chans: Image channels.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the classifier, as in timm.
        embed_dim: Channels of the first stage; each stage doubles them.
        depths: Blocks per stage.
        ssm_ratio: Expansion ratio of the scanned channels.
        mlp_ratio: MLP expansion ratio.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, increasing linearly from 0.
        backend: Scan backend, one of ``elfatt.ops.BACKENDS``; None for the active one.
    """

    no_weight_decay_suffixes = ("A_logs", "Ds", "dt_projs_bias")

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int,
        depths: Sequence[int],
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.assemble(
            DoubleStem(in_chans, embed_dim),
            ConvMerge,
            lambda stage, _: SS2D(dims[stage], ratio=ssm_ratio, backend=backend),
            dims=dims,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
