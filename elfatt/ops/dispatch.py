"""Backend table, the active backend, and automatic selection.

``auto``        the default: fused kernels where verified, else ``sdpa``
``reference``   the paper's formulas, taken literally: slow, any dtype up to float64; the tests' oracle
``plain``       ELFATT in straightforward PyTorch, the benchmark baseline; otherwise as ``sdpa``
``math``        softmax attention as two explicit matmuls (the paper's "nFA")
``sdpa``        softmax attention through ``torch.nn.functional.scaled_dot_product_attention`` (the paper's "FA")
``flash_attn``  softmax attention through the flash-attn package
``triton``      ELFATT and LePE as fused CUDA kernels, forward and backward; otherwise as ``sdpa``
``cpp``         the same as C++ CPU kernels, compiled on first use; also softmax attention in small blocks
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
# preferred by ``auto``, per device type; these fall back to PyTorch operators if a kernel fails
AUTO: dict[str, FusedBackend] = {"cuda": TritonBackend(falls_back=True), "cpu": CppBackend(falls_back=True)}
_TLS_KEY = "elfatt.backend"
_Result = TypeVar("_Result")


class _Ambient(threading.local):
    """This thread's innermost ``use_backend``, and the outer state to restore on exit."""

    def __init__(self):
        self.name = None  # per instance: torch.compile does not guard on the class attribute
        self.outer = ()  # nested tuples: torch.compile would guard on a list's length


_ambient = _Ambient()
_default = "auto"


def active_backend() -> str:
    """Return the name of this thread's backend, one of ``BACKENDS``."""
    return _ambient.name or (None if torch.compiler.is_compiling() else _inherited()) or _default


def _inherited() -> str | None:
    """Return the backend of the thread that called ``backward()``, for autograd's worker threads."""
    return torch._C._get_obj_in_tls(_TLS_KEY) if torch._C._is_key_in_tls(_TLS_KEY) else None


def _hand_on(name: str | None) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(name))  # the next call steals a reference
    torch._C._stash_obj_in_tls(_TLS_KEY, name)


def set_default_backend(name: str, device: torch.device | str | None = None) -> None:
    """Set the backend used outside ``use_backend``, in all threads; ELFATT_BACKEND sets it on import.

    Args:
        name: One of ``BACKENDS``.
        device: Target device, if known.

    Raises:
        ValueError: Unknown name, or a backend that cannot run on this machine or device.
    """
    global _default
    check_backend(name, device)
    _default = name


class use_backend:
    """Context manager that selects this thread's backend.

    Recomputation in the backward pass (``elfatt.ops.checkpoint``) uses the forward pass's backend, even outside the
    context.

    Args:
        name: One of ``BACKENDS``.

    Raises:
        ValueError: Unknown name, or a backend that cannot run on this machine.
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
    """Call ``torch.utils.checkpoint.checkpoint``, recomputing on the backend of the forward pass.

    Args:
        function: A module or function of tensors.
        *args: Its arguments.
    """
    if torch.compiler.is_compiling():  # one graph holds both passes
        return torch_checkpoint(function, *args, use_reentrant=False)
    name = active_backend()
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), use_backend(name)))


def get_backend(name: str) -> PyTorchBackend:
    """Return a backend by name: any of ``BACKENDS`` except ``auto``.

    Raises:
        ValueError: Unknown name.
    """
    if name not in _TABLE:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return _TABLE[name]


def check_backend(name: str, device: torch.device | str | None = None) -> None:
    """Raise ``ValueError`` for an unknown backend or one that cannot run on this machine or device."""
    if name == "auto":
        return
    backend = get_backend(name)
    reason = backend.unsupported_reason()
    if device is not None and reason is None:  # bfloat16: supported by all
        reason = backend.unsupported_reason(torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device=device), (1,))
    if reason:
        raise ValueError(f"backend {name!r} cannot run: {reason}; use 'sdpa'")


def resolve(
    name: str | None,
    x: torch.Tensor | None = None,
    widths: tuple[int, ...] = (),
    block: tuple[int, int] | None = None,
) -> PyTorchBackend:
    """Return the backend for one call.

    Args:
        name: One of ``BACKENDS``; None for the active one.
        x: Input of ELFATT or LePE; None for operations without fused kernels.
        widths: Channels per head of each branch.
        block: Height and width of the local branch's blocks.
    """
    name = name or active_backend()
    widths = tuple(operator.index(width) for width in widths)  # specialises compiled graphs on them
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
