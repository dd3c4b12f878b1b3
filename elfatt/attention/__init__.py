"""Attention mechanisms, one file each: ``[B, H, W, C] -> [B, H, W, C]``."""

from elfatt.attention import agent, cswin, effatt, elfatt, flatten, swin, vanilla  # noqa: F401  registration
from elfatt.attention.registry import create_attention, list_attentions, register_attention

__all__ = ["create_attention", "list_attentions", "register_attention"]
