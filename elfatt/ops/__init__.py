"""Functional attention operations with selectable backends."""

from elfatt.ops.agent import agent_attention
from elfatt.ops.block import block_attention
from elfatt.ops.depthwise import add_lepe, depthwise_conv
from elfatt.ops.dispatch import (
    BACKENDS,
    active_backend,
    checkpoint,
    get_backend,
    set_default_backend,
    use_backend,
)
from elfatt.ops.efficient import efficient_attention
from elfatt.ops.elfatt import elfatt_attention, global_branch
from elfatt.ops.focused import focused_attention
from elfatt.ops.scan import selective_scan
from elfatt.ops.softmax import softmax_attention

__all__ = [
    "BACKENDS",
    "active_backend",
    "add_lepe",
    "agent_attention",
    "block_attention",
    "checkpoint",
    "depthwise_conv",
    "efficient_attention",
    "elfatt_attention",
    "focused_attention",
    "get_backend",
    "global_branch",
    "selective_scan",
    "set_default_backend",
    "softmax_attention",
    "use_backend",
]
