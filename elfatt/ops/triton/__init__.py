"""Triton kernels of the ELFATT operation: the only files that import triton, imported when the kernels first run."""

from elfatt.ops.triton.launch import backward, forward, lepe, lepe_sums, new_buffers

__all__ = ["backward", "forward", "lepe", "lepe_sums", "new_buffers"]
