"""Attention mechanisms, one file each: ``[B, H, W, C] -> [B, H, W, C]``."""

from elfatt.attention import agent, cswin, effatt, elfatt, flatten, swin, vanilla  # noqa: F401  registration
from elfatt.attention.registry import attention_options, create_attention, list_attentions, register_attention

__all__ = ["attention_options", "create_attention", "list_attentions", "register_attention"]
