"""Triton GPU kernels for ELFATT and LePE; ``triton`` itself is imported on first use."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from elfatt.ops.fused import FusedBackend
from elfatt.ops.pytorch import dtype_name

OLDEST = (3, 3)  # minimum Triton version, that of torch 2.7
WIDEST = 64  # channels per head
# Widest head for which ``auto`` uses the kernels, by major compute capability and dtype. Everything else uses PyTorch
# operators until measured: ROCm, whose compiler rejects tf32x3, and 10.0 and newer.
_HALVES = (torch.float16, torch.bfloat16)
VERIFIED = (
    (9, _HALVES, 64),  # measured on an H200
    (9, (torch.float32,), 32),  # tested on an H200; wider heads spill 0.8 KB per thread
    (8, _HALVES, 64),  # compiles cleanly for 8.0, 8.6 and 8.9
    (8, (torch.float32,), 32),  # wider heads spill up to 2.7 KB
)


class TritonBackend(FusedBackend):
    """``triton``: float16, bfloat16 and float32 on CUDA devices of compute capability 8.0 or newer."""

    name = "triton"
    devices = ("cuda",)
    dtypes = (*_HALVES, torch.float32)
    kernels_module = "elfatt.ops.triton.launch"

    def unsupported_reason(self, x=None, widths=(), bias=None):
        if x is None:
            return _missing_package()
        reason = super().unsupported_reason(x, widths)
        if reason is None and x.stride(0) >= 2**31:
            return "it uses 32-bit indices within an image"
        return reason

    def limit(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
        if reason := _missing_package():
            return reason
        if device.type not in self.devices and not (device.type == "cpu" and _interpreted()):
            return f"it needs CUDA tensors, not {device.type} (TRITON_INTERPRET=1 runs its kernels on a CPU)"
        if dtype not in self.dtypes:
            return f"it needs float16, bfloat16 or float32, not {dtype_name(dtype)}"
        if max(widths, default=0) > WIDEST:
            return f"it supports heads of up to {WIDEST} channels, not {max(widths)}"
        return None if _interpreted() else _device_limit(device.index)

    def unverified(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
        if device.type != "cuda":
            return None
        if torch.version.hip:
            return "they are not verified on ROCm"
        major, minor = _capability(device.index)
        widest = next((widest for number, dtypes, widest in VERIFIED if number == major and dtype in dtypes), 0)
        if max(widths, default=1) <= widest:
            return None
        heads = f", heads wider than {widest}" if widest else ""
        return f"they are not verified on compute capability {major}.{minor} in {dtype_name(dtype)}{heads}"


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _device_limit(index: int | None) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    if torch.version.cuda and _capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    return _missing_toolchain()


@cache
def _missing_package() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it is not installed: pip install triton"
    return None


@cache
def _missing_toolchain() -> str | None:
    """Return what Triton lacks to build its launchers, such as a C compiler or Python's headers, or None."""
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or newer, not {version}: pip install --upgrade triton"
        importlib.import_module(TritonBackend.kernels_module)
    except Exception as error:
        return f"triton cannot be imported: {error}"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), None)
    if compiler is None or shutil.which(compiler) is None:
        return "triton needs a C compiler: install gcc or set CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton does
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.exists():
        return f"triton needs Python's headers, but {header} is missing: install python3-dev"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
