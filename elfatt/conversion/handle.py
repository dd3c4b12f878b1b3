"""Base class of the adapters' handles: one removable conversion per model, safe to share between threads.

A converted layer's class is replaced by a subclass whose ``__call__`` runs the plan, so that hooks, wrappers and
assigned ``forward`` methods of others stay as they are, whichever came first. What a layer needs to know about the call
that it is part of is a ``Call``, kept per thread. Calls also travel with the input of every module around a converted
layer, from where activation checkpointing re-enters them.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from elfatt.conversion.intercept import InterceptAttention
from elfatt.conversion.merging import Tokens

_applied: WeakKeyDictionary[nn.Module, ref[Handle]] = WeakKeyDictionary()  # weak, as handles refer to their models
_BINDING, _CALL = "_elfatt_binding", "_elfatt_call"  # attributes of converted layers, and of tensors' storages


@dataclass(frozen=True)
class Call:
    """What the layers need to know about one call of their model.

    Attributes:
        size: Map height and width in tokens; None if unknown.
        prefix: Number of tokens before the map.
        runs: Whether the plan runs in this call.
        done: Fraction of steps done, for diffusion models.
        masked: Whether the model was called with an attention mask.
        tokens: How the layer's tokens are merged, if they are.
    """

    size: tuple[int, int] | None = None
    prefix: int = 0
    runs: bool = True
    done: float = 0.0
    masked: bool = False
    tokens: Tokens | None = None


class _State(threading.local):
    """Each thread's state of a handle.

    Attributes:
        call: The call whose layers run next.
        backward: Backward pass in which it was entered, -1 for none.
        inside: Whether the model's forward runs.
        ran: Layers whose attention was intercepted.
        failed: Layers whose attention was not.
        visited: Modules around converted layers that were called.
        inputs: Inputs of the blocks whose layers merge tokens.
    """

    def __init__(self):
        self.call: Call | None = None
        self.backward = -1
        self.inside = False
        self.ran: set[str] = set()
        self.failed: list[str] = []
        self.visited: set[nn.Module] = set()
        self.inputs: dict[str, torch.Tensor] = {}


@dataclass(frozen=True)
class Binding:
    """A converted layer's handle, and its name there."""

    handle: Any  # of the adapter's class
    name: str


class ConvertedLayer:
    """Mixin put in front of a layer's class; without a binding, the layer is what it was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with its handle's attention."""
        binding = binding_of(self)
        call = super().__call__  # type: ignore[misc]  # the layer's
        if binding is None:
            return call(*args, **kwargs)
        if args and isinstance(args[0], torch.fx.Proxy):
            raise TypeError(f"torch.fx cannot trace the converted {binding.name}: use torch.export or torch.compile")
        binding.handle._carry(self, args, kwargs)
        return binding.handle.run(binding.name, self, call, args, kwargs)

    def __reduce_ex__(self, protocol):
        mixin, layer = type(self).__bases__[:2]
        if type(self) is not _converted(mixin, layer):  # subclassed since
            return super().__reduce_ex__(protocol)
        return _rebuild, (mixin, layer), super().__getstate__()  # type: ignore[misc]


def binding_of(layer: object) -> Binding | None:
    """Return a layer's binding, or None if it is not converted."""
    binding = layer.__dict__.get(_BINDING)
    return binding if binding is not None and binding.handle.active else None


@functools.cache
def _converted(mixin: type, layer: type) -> type:
    names = {key: getattr(layer, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(layer.__name__, (mixin, layer), names)


def _rebuild(mixin, layer):
    kind = _converted(mixin, layer)
    return kind.__new__(kind)


class Handle:
    """A conversion applied to a model, undone by ``remove`` or on leaving the ``with`` block.

    A model has at most one handle; a new one replaces the old. Deep copies of the model get their own handle.

    Args:
        model: The model. Subclasses ``bind`` its layers after this constructor.
    """

    def __init__(self, model: nn.Module):
        if before := handle_of(model):
            before.remove()
        self.model, self.state = model, _State()
        self._bound: dict[str, nn.Module] = {}
        self._hooks: list[Any] = []
        self._warned: set[str] = set()
        self._complete = False  # every layer ran its plan in some call
        self.active = True
        _applied[model] = ref(self)

    def bind(self, layers: Mapping[str, nn.Module], mixin: type = ConvertedLayer) -> None:
        """Convert layers, and follow the calls of the modules around them."""
        self._bound = dict(layers)
        if not layers:
            return
        layer: Any  # gets a new attribute
        for name, layer in layers.items():
            if not isinstance(layer, mixin):
                layer.__class__ = _converted(mixin, type(layer))  # type: ignore[arg-type]  # types have a hash
            setattr(layer, _BINDING, Binding(self, name))
        self._hooks.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._end, always_call=True))
        around = {name.rsplit(".", count)[0] for name in layers for count in range(1, name.count(".") + 1)}
        parents = [self.model.get_submodule(name) for name in sorted(around)]
        # children too, as transformers recomputes a block without calling it
        for module in dict.fromkeys([*parents, *(child for parent in parents for child in parent.children())]):
            self._hooks.append(module.register_forward_pre_hook(self._carry, with_kwargs=True))

    def remove(self) -> None:
        """Restore the model. Safe to call twice."""
        self.active = False  # for copies of single layers
        for hook in self._hooks:
            hook.remove()
        layer: Any
        for layer in self._bound.values():
            binding = layer.__dict__.get(_BINDING)
            if binding is not None and binding.handle is self:
                delattr(layer, _BINDING)
                bases = type(layer).__bases__
                if len(bases) == 2 and type(layer) is _converted(*bases):  # not subclassed since
                    layer.__class__ = bases[1]
        self._hooks, self._bound = [], {}
        self._restore()
        if handle_of(self.model) is self:
            del _applied[self.model]

    def _restore(self) -> None:
        """Undo what the subclass changed besides binding layers."""

    def enter(self, call: Call) -> None:
        """Set the call whose layers this thread runs next."""
        self.state.call, self.state.backward = call, _backward()

    def run(self, name: str, layer: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a converted layer, with its attention intercepted."""
        with InterceptAttention(functools.partial(self._replace, name, layer)):
            return self.run_checked(name, call, args, kwargs)

    def run_checked(self, name: str, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a converted layer and check that its plan ran, which whoever runs it adds to ``state.ran``."""
        state = self.state
        state.ran.discard(name)
        out = call(*args, **kwargs)
        if name not in state.ran:
            state.failed.append(name)
            if not state.inside:
                self._raise_failed()
        return out

    def attention(
        self, name: str, layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """Compute a layer's attention on tensors ``[B, N, heads, d]``, or return None to leave it exact."""
        raise NotImplementedError

    def known_call(self, name: str) -> Call | None:
        """Return the call that a layer belongs to; None if it runs outside its model's forward.

        Raises:
            RuntimeError: The layer is recomputed in a backward pass for an unknown call.
        """
        state, backward = self.state, _backward()
        if backward >= 0 and state.backward != backward:
            raise RuntimeError(
                f"{name} is recomputed in the backward pass of an unknown call: checkpoint modules of the model, "
                "and do not move their inputs"
            )
        return state.call

    def warn(self, name: str, met: str, remedy: str) -> None:
        """Warn, once per reason, that a layer's attention stays exact."""
        if met not in self._warned:
            self._warned.add(met)
            warnings.warn(f"{name} keeps exact attention: {met}; {remedy}", stacklevel=2)

    def _replace(self, name, layer, q, k, v, scale, refusal):
        """Implement ``InterceptAttention``'s function."""
        if refusal == "dropout":
            raise ValueError(f"{name} drops attention weights, which conversion does not support: set the rate to 0")
        self.state.ran.add(name)
        if refusal:
            self.warn(name, f"it has {refusal}", "conversion supports plain self-attention only")
            return None
        return self.attention(name, layer, q, k, v, scale)

    def _raise_failed(self):
        state = self.state
        failed, state.failed = state.failed, []
        raise RuntimeError(
            f"the plan did not run in {', '.join(failed)}: no call of PyTorch's scaled_dot_product_attention was seen; "
            "use it (no attention slicing, explicit products or replaced function), or remove() the conversion"
        )

    def _begin(self, model, args, kwargs):
        """Before the model's forward."""
        state = self.state
        state.inside, state.call = True, None
        state.ran.clear()
        state.failed.clear()
        state.visited.clear()
        state.inputs.clear()

    def _end(self, model, args, out):
        """After the model's forward: check that the layers ran their plan; the first time, that they ran at all."""
        state = self.state
        runs, state.inside, state.call = state.call is None or state.call.runs, False, None
        if out is None:  # an exception
            return
        if state.failed:
            self._raise_failed()
        if runs and not self._complete and not torch.compiler.is_compiling():
            modules = dict(self.model.named_modules())
            missing = [  # although the module around it did: others may skip or cut off whole blocks
                name
                for name in self.promised
                if name not in state.ran and modules.get(name.rpartition(".")[0]) in state.visited
            ]
            if missing:
                raise RuntimeError(
                    f"{', '.join(missing)} did not run in the model's forward, so their plan has no effect: "
                    "remove() the conversion and leave these layers out of the plan"
                )
            self._complete = True
            state.visited.clear()

    @property
    def promised(self) -> list[str]:
        """Names of the layers whose attention is replaced."""
        return list(self._bound)

    def _carry(self, module, args, kwargs):
        """Before a module around converted layers: tie the call to its input, or re-enter it if recomputed."""
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if torch.compiler.is_compiling() or x is None:
            return
        if not self._complete:
            self.state.visited.add(module)
        recomputed = _backward() >= 0
        if not (recomputed or x.requires_grad or torch.is_grad_enabled()):
            return
        try:
            storage: Any = x.untyped_storage()
        except (NotImplementedError, RuntimeError):  # wrappers of functorch have none
            return
        if recomputed:
            owner, call = getattr(storage, _CALL, (None, None))
            if owner is not None and owner() is self:
                self.enter(call)
        elif self.state.call is not None:
            setattr(storage, _CALL, (ref(self), self.state.call))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict) -> Self:
        if id(self.model) not in memo:  # a copy of some layers, for the same model
            return self
        memo[id(self)] = other = object.__new__(type(self))
        vars(other).update(copy.deepcopy(self.__getstate__(), memo), state=_State())
        if handle_of(self.model) is self:
            _applied[other.model] = ref(other)
        return other

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "state"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, state=_State())
        _applied[self.model] = ref(self)  # of a pickled model


def handle_of(model: nn.Module) -> Handle | None:
    """Return the handle applied to a model, or None."""
    return _applied[model]() if model in _applied else None


def _backward() -> int:
    """Return the id of the backward pass that this thread runs, or -1."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
