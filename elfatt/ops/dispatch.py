"""Which backend runs an operation: the table of backends, the ambient default, and the choice that ``auto`` makes.

``auto``        the default: the fused kernels where they are verified, else ``sdpa``
``reference``   the formula as the paper writes it: slow, any dtype up to float64, the oracle of the tests
``plain``       ELFATT in straightforward PyTorch, the baseline of the benchmarks; the rest as ``sdpa``
``math``        softmax attention as two explicit matrix products (the paper's "nFA")
``sdpa``        softmax attention through ``torch.nn.functional.scaled_dot_product_attention`` (the paper's "FA")
``flash_attn``  softmax attention through the flash-attn package
``triton``      the ELFATT operation and LePE as fused CUDA kernels, forward and backward; the rest as ``sdpa``
``cpp``         the same as C++ kernels for a CPU, compiled at first use, and softmax attention in small blocks of a map
"""

from __future__ import annotations

import ctypes
import operator
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from elfatt.ops.cpp import CppBackend
from elfatt.ops.fused import FusedBackend, explain_once, is_transformed
from elfatt.ops.plain import PlainBackend
from elfatt.ops.pytorch import SDPA, FlashAttnBackend, MathBackend, PyTorchBackend
from elfatt.ops.reference import ReferenceBackend
from elfatt.ops.triton import TritonBackend

_TABLE: dict[str, PyTorchBackend] = {
    backend.name: backend
    for backend in (
        ReferenceBackend(),
        PlainBackend(),
        MathBackend(),
        SDPA,
        FlashAttnBackend(),
        TritonBackend(),
        CppBackend(),
    )
}
BACKENDS = ("auto", *_TABLE)
# what ``auto`` prefers on each device type; these fall back to PyTorch operators where a kernel fails
AUTO: dict[str, FusedBackend] = {"cuda": TritonBackend(falls_back=True), "cpu": CppBackend(falls_back=True)}
_TLS_KEY = "elfatt.backend"
_Result = TypeVar("_Result")


class _Ambient(threading.local):
    """This thread's innermost ``use_backend``, and the state to restore on leaving it."""

    def __init__(self):
        self.name = None  # set here and not on the class, or torch.compile does not guard on it
        self.outer = ()  # nested, for torch.compile would guard on the length of a list


_ambient = _Ambient()
_default = "auto"


def active_backend() -> str:
    """Name of the backend in force in this thread, one of ``BACKENDS``."""
    return _ambient.name or (None if torch.compiler.is_compiling() else _inherited()) or _default


def _inherited() -> str | None:
    """The backend of the thread that called ``backward()``, as seen from autograd's worker threads."""
    return torch._C._get_obj_in_tls(_TLS_KEY) if torch._C._is_key_in_tls(_TLS_KEY) else None


def _hand_on(name: str | None) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(name))  # the next call steals a reference
    torch._C._stash_obj_in_tls(_TLS_KEY, name)


def set_default_backend(name: str, device: torch.device | str | None = None) -> None:
    """Choose the backend of every thread outside ``use_backend``; the variable ELFATT_BACKEND does so at import.

    Args:
        name: One of ``BACKENDS``.
        device: Where it is to run, if that is known.

    Raises:
        ValueError: The name is unknown, or the backend cannot run on this machine or device.
    """
    global _default
    check_backend(name, device)
    _default = name


class use_backend:
    """Run the operations of this thread on one backend inside the ``with`` block.

    A backward pass that recomputes (``elfatt.ops.checkpoint``) runs on the backend of its forward pass, wherever it is
    called.

    Args:
        name: One of ``BACKENDS``.

    Raises:
        ValueError: The name is unknown, or the backend cannot run on this machine.
    """

    def __init__(self, name: str):
        check_backend(name)
        self.name = name

    def __enter__(self) -> None:
        compiling = torch.compiler.is_compiling()
        _ambient.outer = _ambient.name, None if compiling else _inherited(), _ambient.outer
        _ambient.name = self.name
        if not compiling:
            _hand_on(self.name)

    def __exit__(self, *_) -> None:
        _ambient.name, inherited, _ambient.outer = _ambient.outer
        if not torch.compiler.is_compiling():
            _hand_on(inherited)


def checkpoint(function: Callable[..., _Result], *args: Any) -> _Result:
    """``torch.utils.checkpoint.checkpoint`` that recomputes on the backend of the forward pass.

    Args:
        function: A module or function of tensors.
        *args: Its arguments.
    """
    if torch.compiler.is_compiling():  # one graph holds both passes
        return torch_checkpoint(function, *args, use_reentrant=False)
    name = active_backend()
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), use_backend(name)))


def get_backend(name: str) -> PyTorchBackend:
    """Look up a backend by name: any of ``BACKENDS`` except ``auto``.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in _TABLE:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return _TABLE[name]


def check_backend(name: str, device: torch.device | str | None = None) -> None:
    """Raise ``ValueError`` for an unknown name and for a backend that cannot run on this machine or device."""
    if name == "auto":
        return
    backend = get_backend(name)
    reason = backend.unsupported_reason()
    if device is not None and reason is None:  # of a dtype that all of them take
        reason = backend.unsupported_reason(torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device=device), (1,))
    if reason:
        raise ValueError(f"backend {name!r} cannot run: {reason}; use 'sdpa'")


def resolve(
    name: str | None,
    x: torch.Tensor | None = None,
    widths: tuple[int, ...] = (),
    block: tuple[int, int] | None = None,
) -> PyTorchBackend:
    """Resolve the backend of one call.

    Args:
        name: One of ``BACKENDS``, or None for the ambient one.
        x: The map of the ELFATT operation or LePE; None for an operation without fused kernels.
        widths: Channels of a head in each branch.
        block: Height and width of the local branch's blocks.
    """
    name = name or active_backend()
    widths = tuple(operator.index(width) for width in widths)  # a graph is compiled for its own
    return _choose(x, widths, block) if name == "auto" else get_backend(name)


def _choose(x, widths, block) -> PyTorchBackend:
    fused = None if x is None else AUTO.get(x.device.type)
    if fused is None or torch.jit.is_tracing() or _is_exporting() or is_transformed():
        return SDPA
    if reason := fused.unsupported_reason(x, widths) or fused.unverified_reason(x, widths, block):
        explain_once(fused.name, reason)
        return SDPA
    return fused


@torch.compiler.assume_constant_result  # Dynamo folds is_exporting() to True
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


if _from_environment := os.environ.get("ELFATT_BACKEND"):
    try:
        set_default_backend(_from_environment)
    except ValueError as error:
        raise ValueError(f"ELFATT_BACKEND: {error}") from None
