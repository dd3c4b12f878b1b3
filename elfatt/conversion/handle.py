"""What an adapter changes in a model, one conversion at a time, and the way back."""

from __future__ import annotations

import copy
from typing import Self
from weakref import WeakKeyDictionary, ref

from torch import nn

_applied: WeakKeyDictionary[nn.Module, ref[Handle]] = WeakKeyDictionary()  # a handle refers to its model


class Handle:
    """Another attention within a model; ``remove`` takes it out, and so does leaving it as a context.

    A model has one at most: the next one takes the former out. A deep copy of the model has a copy of its own.

    Args:
        model: Whose layers a subclass changes behind this, and puts back in ``_restore``.
    """

    def __init__(self, model: nn.Module):
        if before := handle_of(model):
            before.remove()
        self.model = model
        _applied[model] = ref(self)

    def _restore(self) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        """Leaves the model as it was; a second call does nothing."""
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
    """What is applied to a model."""
    return _applied[model]() if model in _applied else None
