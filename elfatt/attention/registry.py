"""Registry of attention mechanisms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from timm.models import register_notrace_module
from torch import nn

from elfatt.suggest import did_you_mean

_ATTENTIONS: dict[str, type[nn.Module]] = {}


def register_attention(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a class decorator that registers a mechanism.

    Raises:
        ValueError: The name is taken.
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _ATTENTIONS:
            raise ValueError(f"attention {name!r} is already registered by {_ATTENTIONS[name].__qualname__}")
        _ATTENTIONS[name] = cls
        return register_notrace_module(cls)  # a torch.fx leaf, as its code depends on the map's size

    return register


def list_attentions() -> list[str]:
    """Return the names of all mechanisms, sorted."""
    return sorted(_ATTENTIONS)


def attention_options(name: str) -> list[str]:
    """Return a mechanism's keywords besides ``dim`` and ``num_heads``.

    Raises:
        ValueError: Unknown name.
    """
    if name not in _ATTENTIONS:
        hint = did_you_mean(name, _ATTENTIONS) or f": choose one of {', '.join(list_attentions())}"
        hint = {"global": ": use 'vanilla'", "local": ": use 'swin' or 'cswin'"}.get(name, hint)  # names of models
        raise ValueError(f"unknown attention {name!r}{hint}")
    return list(inspect.signature(_ATTENTIONS[name]).parameters)[2:]


def create_attention(name: str, *, dim: int, num_heads: int, **options: Any) -> nn.Module:
    """Build an attention mechanism.

    Args:
        name: One of ``list_attentions()``.
        dim: Channels C.
        num_heads: Attention heads.
        **options: The mechanism's own keywords.

    Returns:
        Module that maps ``[B, H, W, dim]`` to ``[B, H, W, dim]``.

    Raises:
        ValueError: Unknown name or invalid value.
        TypeError: Unknown option.
    """
    known = attention_options(name)
    for option in options:
        if option not in known:
            raise TypeError(f"attention {name!r} has no option {option!r}: it takes {', '.join(known)}")
    return _ATTENTIONS[name](dim, num_heads, **options)
