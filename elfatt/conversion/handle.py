"""Base class of the adapters' handles: one removable conversion per model, safe to share between threads.

A converted layer's class is replaced by a subclass that runs the plan, so that hooks, wrappers and assigned ``forward``
methods stay as they are, whichever came first. What a layer needs to know about the call of the model is a ``Call``,
kept per thread. The classes of the modules around it are replaced as well: they tie the call to their input, from where
activation checkpointing re-enters it.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        masked: Whether the model may have been called with an attention mask.
        tokens: How the layer's tokens are merged, if they are.
        draws: State of the random generator before each layer's merging, which a recomputation starts from.
    """

    size: tuple[int, int] | None = None
    prefix: int = 0
    runs: bool = True
    done: float = 0.0
    masked: bool = True
    tokens: Tokens | None = None
    draws: dict[str, torch.Tensor] = field(default_factory=dict)


class _State(threading.local):
    """Each thread's state of a handle.

    Attributes:
        call: The call whose layers run next.
        backward: Backward pass in which it was entered, -1 for none.
        inside: Whether the model's forward runs.
        open: Layers whose attention is being intercepted.
        reached: Those of them whose assigned ``forward`` has called ours.
        ran: Layers that ran their plan.
        failed: Layers whose attention was not intercepted.
        visited: Modules around converted layers that were called.
        inputs: Inputs of the blocks whose layers merge tokens.
        generator: Random generator for merging.
    """

    def __init__(self):
        self.call: Call | None = None
        self.backward = -1
        self.inside = False
        self.open: set[str] = set()
        self.reached: set[str] = set()
        self.ran: set[str] = set()
        self.failed: list[str] = []
        self.visited: set[nn.Module] = set()
        self.inputs: dict[str, torch.Tensor] = {}
        self.generator: torch.Generator | None = None


@dataclass(frozen=True)
class Binding:
    """The handle of a module whose class was replaced, and the module's name."""

    handle: Any  # of the adapter's class
    name: str


class _Bound:
    """Mixin put in front of a module's class, which stays as it was without an active binding."""

    def __reduce_ex__(self, protocol):
        mixin, kind = type(self).__bases__[:2]
        if type(self) is not _bound(mixin, kind):  # subclassed since
            return super().__reduce_ex__(protocol)
        return _rebuild, (mixin, kind), super().__getstate__()  # type: ignore[misc]


class ConvertedLayer(_Bound):
    """A layer that runs its handle's attention."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; a ``forward`` assigned before the conversion is intercepted here."""
        binding, call = binding_of(self), super().__call__  # type: ignore[misc]  # the layer's
        if binding is None or "forward" not in self.__dict__:
            return call(*args, **kwargs)
        return binding.handle.start(binding.name, self, call, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with its handle's attention."""
        if not isinstance(self, ConvertedLayer):  # a bound method that outlived the conversion
            return type(self).forward(self, *args, **kwargs)
        binding = binding_of(self)
        if binding is None:
            return self.run_layer(*args, **kwargs)
        state = binding.handle.state
        if binding.name in state.open:
            state.reached.add(binding.name)
            return self.run_layer(*args, **kwargs)
        return binding.handle.start(binding.name, self, self.run_layer, args, kwargs)

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Surrounding(_Bound):
    """A module around converted layers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if binding := binding_of(self):
            binding.handle.carry(self, args, kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _Surrounding):  # as above
            return type(self).forward(self, *args, **kwargs)
        if binding := binding_of(self):
            binding.handle.carry(self, args, kwargs)  # transformers recomputes forward alone
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def binding_of(module: object) -> Binding | None:
    """Return a module's binding, or None if its handle was removed."""
    binding = module.__dict__.get(_BINDING)
    return binding if binding is not None and binding.handle.active else None


@functools.cache
def _bound(mixin: type, kind: type) -> type:
    names = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (mixin, kind), names)


def _rebuild(mixin, kind):
    found = _bound(mixin, kind)
    return found.__new__(found)


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
        self._layers: list[str] = []
        self._hooks: list[Any] = []
        self._warned: set[str] = set()
        self._complete = False  # every layer ran its plan in some call
        self.active = True
        _applied[model] = ref(self)

    def bind(self, layers: Mapping[str, nn.Module], mixin: type = ConvertedLayer) -> None:
        """Convert layers, and follow the calls of the modules around them.

        Raises:
            ValueError: A layer is part of another converted model.
        """
        if not layers:
            return
        for name, layer in layers.items():
            if binding := binding_of(layer):
                other = type(binding.handle.model).__name__
                raise ValueError(f"{name} is shared with a converted {other}: remove() that conversion first")
        self._layers = list(layers)
        around = {name.rsplit(".", count)[0] for name in layers for count in range(1, name.count(".") + 1)}
        parents = {name: self.model.get_submodule(name) for name in sorted(around)}
        parents = {name: module for name, module in parents.items() if type(module).forward is not nn.Module.forward}
        self._bound = parents | dict(layers)
        for name, module in self._bound.items():
            kind = mixin if name in layers else _Surrounding
            if not isinstance(module, kind):
                module.__class__ = _bound(kind, type(module))  # type: ignore[arg-type]  # types have a hash
            setattr(module, _BINDING, Binding(self, name))
        self._hooks.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Restore the model. Safe to call twice."""
        self.active, self.state = False, _State()  # inactive for copies of single layers
        for hook in self._hooks:
            hook.remove()
        module: Any
        for module in self._bound.values():
            binding = module.__dict__.get(_BINDING)
            if binding is not None and binding.handle is self:
                delattr(module, _BINDING)
                bases = type(module).__bases__
                if len(bases) == 2 and type(module) is _bound(*bases):  # not subclassed since
                    module.__class__ = bases[1]
        self._hooks, self._bound = [], {}
        self._restore()
        if handle_of(self.model) is self:
            del _applied[self.model]

    def _restore(self) -> None:
        """Undo what the subclass changed besides binding layers."""

    def enter(self, call: Call | None) -> None:
        """Set the call whose layers this thread runs next."""
        self.state.call, self.state.backward = call, _backward()

    def start(self, name: str, layer: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a converted layer and check that its plan ran."""
        if args and isinstance(args[0], torch.fx.Proxy):
            raise TypeError(f"torch.fx cannot trace the converted {name}: use torch.export or torch.compile")
        self.carry(layer, args, kwargs)
        state = self.state
        state.ran.discard(name)
        state.open.add(name)
        try:
            out = self.run(name, layer, call, args, kwargs)
        finally:
            state.open.discard(name)
            state.reached.discard(name)
        if name not in state.ran:
            state.failed.append(name)
            if not state.inside:
                self._raise_failed()
        if not state.inside and state.ran.issuperset(self.promised):  # the end of forward_features and the like
            state.call = None
            state.ran.clear()
        return out

    def run(self, name: str, layer: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a converted layer, with its attention intercepted; adds it to ``state.ran`` if its plan ran."""
        recorded = torch.is_grad_enabled()
        with InterceptAttention(functools.partial(self._replace, name, layer, recorded)):
            return call(*args, **kwargs)

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
        if torch.compiler.is_dynamo_compiling() or state.backward == backward:
            return state.call
        if backward >= 0:
            raise RuntimeError(
                f"{name} is recomputed in the backward pass of an unknown call: checkpoint modules of the model, "
                "and do not move their inputs"
            )
        return None

    def warn(self, name: str, met: str, remedy: str) -> None:
        """Warn, once per reason, that a layer's attention stays exact."""
        if met not in self._warned:
            self._warned.add(met)
            warnings.warn(f"{name} keeps exact attention: {met}; {remedy}", stacklevel=2)

    def _replace(self, name, layer, recorded, q, k, v, scale, refusal):
        """Implement ``InterceptAttention``'s function."""
        if recorded and not torch.is_grad_enabled() and "forward" in layer.__dict__ and name not in self.state.reached:
            raise RuntimeError(
                f"{name}.forward was replaced before the conversion and would be recomputed without it: convert first"
            )
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
        state.inputs.clear()
        if out is None:  # an exception
            return
        if state.failed:
            self._raise_failed()
        if runs and not self._complete and not torch.compiler.is_dynamo_compiling():
            # only in blocks that were called: programs may skip or cut off others
            called = {binding.name for module in state.visited if (binding := binding_of(module))} | {""}
            missing = [name for name in self.promised if name not in state.ran and name.rpartition(".")[0] in called]
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
        return self._layers

    def carry(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a module around converted layers: tie the call to its input, or re-enter it if recomputed."""
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if torch.compiler.is_dynamo_compiling() or x is None:
            return
        if not self._complete:
            self.state.visited.add(module)
        recomputed = _backward() >= 0
        if not (recomputed or x.requires_grad or torch.is_grad_enabled()):
            return
        try:
            storage: Any = x.untyped_storage()
        except (NotImplementedError, RuntimeError):  # functorch's wrappers have none
            return
        if not recomputed:
            setattr(storage, _CALL, (ref(self), self.state.call))
            return
        owner, call = getattr(storage, _CALL, (None, None))
        if owner is not None and owner() is self:
            self.enter(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict) -> Self:
        if id(self.model) not in memo:  # a copy of some layers, for the same model
            return self
        memo[id(self)] = other = object.__new__(type(self))
        vars(other).update(copy.deepcopy(self.__getstate__(), memo), state=_State())
        for name, module in other._bound.items():  # copied before their model
            setattr(module, _BINDING, Binding(other, name))
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
    return -1 if torch.compiler.is_dynamo_compiling() else torch._C._current_graph_task_id()
