"""Triton kernels of the ELFATT operation. The only files that import triton; imported when the backend is first used."""

from elfatt.ops.triton.launch import backward, forward

__all__ = ["backward", "forward"]
