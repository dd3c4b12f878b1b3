"""C++ kernels of the ELFATT operation and of LePE for CPUs, compiled at first use."""

from __future__ import annotations

import torch

from elfatt.ops.cpp.build import unavailable_reason
from elfatt.ops.fused import FusedBackend
from elfatt.ops.pytorch import dtype_name


class CppBackend(FusedBackend):
    """``cpp``: float32 and bfloat16 on a CPU; needs a C++ compiler."""

    name = "cpp"
    kernels_module = "elfatt.ops.cpp.launch"

    def limit(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
        if device.type != "cpu":
            return f"it needs CPU tensors, not {device.type}"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"it needs bfloat16 or float32, not {dtype_name(dtype)}"
        return unavailable_reason()
