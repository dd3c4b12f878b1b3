"""C++ CPU kernels for ELFATT, block attention and LePE, compiled on first use."""

from __future__ import annotations

import torch

from elfatt.ops.cpp.build import unavailable_reason
from elfatt.ops.fused import FusedBackend, is_transformed
from elfatt.ops.pytorch import dtype_name

LARGEST_BLOCK = 768  # tokens per block in block_attention; PyTorch's SDPA is as fast from about 1024


class CppBackend(FusedBackend):
    """``cpp``: float32 and bfloat16 on CPUs; needs a C++ compiler."""

    name = "cpp"
    devices = ("cpu",)
    dtypes = (torch.bfloat16, torch.float32)
    kernels_module = "elfatt.ops.cpp.launch"

    def limit(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
        if device.type not in self.devices:
            return f"it needs CPU tensors, not {device.type}"
        if dtype not in self.dtypes:
            return f"it needs bfloat16 or float32, not {dtype_name(dtype)}"
        return unavailable_reason()

    def block_attention(self, qkv, *, num_heads, block, lepe):
        channels = qkv.shape[-1]
        fits = block[0] * block[1] <= LARGEST_BLOCK and (lepe is None or lepe[0].shape[-1] == 3)
        if not fits or is_transformed() or self.unsupported_reason(qkv, (channels // num_heads,)):
            return super().block_attention(qkv, num_heads=num_heads, block=block, lepe=lepe)
        return self.elfatt_attention(  # a local branch without a global one
            qkv.flatten(3),
            num_heads=(1, num_heads),
            global_channels=0,
            block=block,
            lepe_global=None,
            lepe_local=lepe,
        )
