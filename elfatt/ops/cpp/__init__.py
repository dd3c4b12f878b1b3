"""C++ kernels of the ELFATT operation for CPUs, compiled when they first run."""

from elfatt.ops.cpp.launch import backward, forward, lepe, lepe_sums, new_buffers

__all__ = ["backward", "forward", "lepe", "lepe_sums", "new_buffers"]
