"""Base class of the adapters' handles: one removable conversion per model."""

from __future__ import annotations

import copy
from typing import Self
from weakref import WeakKeyDictionary, ref

from torch import nn

_applied: WeakKeyDictionary[nn.Module, ref[Handle]] = WeakKeyDictionary()  # weak, as handles refer to their models


class Handle:
    """A conversion applied to a model, undone by ``remove`` or on leaving the ``with`` block.

    A model has at most one handle; a new one replaces the old. Deep copies of the model get their own handle.

    Args:
        model: The model. Subclasses change its layers after this constructor and undo that in ``_restore``.
    """

    def __init__(self, model: nn.Module):
        if before := handle_of(model):
            before.remove()
        self.model = model
        _applied[model] = ref(self)

    def _restore(self) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        """Restore the model. Safe to call twice."""
        self._restore()
        if handle_of(self.model) is self:
            del _applied[self.model]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict) -> Self:
        memo[id(self)] = other = object.__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        if handle_of(self.model) is self:
            _applied[other.model] = ref(other)
        return other


def handle_of(model: nn.Module) -> Handle | None:
    """Return the handle applied to a model, or None."""
    return _applied[model]() if model in _applied else None
