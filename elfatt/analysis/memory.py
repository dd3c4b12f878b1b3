"""Memory of a forward pass, counted on the meta device for any image size or measured."""

from __future__ import annotations

import multiprocessing
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elfatt.analysis.complexity import FusedAttention
from elfatt.analysis.environment import available_bytes
from elfatt.analysis.timing import RunSpec
from elfatt.ops import use_backend


class LiveTensors(TorchDispatchMode):
    """Track the bytes of live intermediate tensors, without the temporaries inside an operation.

    Attributes:
        peak: Peak number of live bytes.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, None)  # weights and images, whose views are not new memory
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = weakref.finalize(storage, self._free, storage.nbytes())
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)

    def _free(self, size: int) -> None:
        self.alive -= size


def _storages(values) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def count_memory(
    model: torch.nn.Module, shape: tuple[int, ...], backend: str, dtype: torch.dtype, backward: bool = False
) -> int:
    """Count the peak bytes of intermediate tensors in a forward pass, without running it.

    Args:
        model: Model on the ``meta`` device, in eval mode; converted to ``dtype`` in place.
        shape: Image shape ``[B, 3, H, W]``.
        backend: Backend of the operations; fused attention only counts its inputs and output.
        dtype: Dtype of the model and images.
        backward: Keep what the backward pass needs, except weight gradients.
    """
    model = model.to(dtype)
    image = torch.empty(shape, dtype=dtype, device="meta")
    fused = nullcontext() if backend == "math" else FusedAttention()
    with torch.inference_mode(not backward), use_backend(backend), LiveTensors() as live, fused:
        out = model(image)
    del out  # keeps what the backward pass needs alive until here
    return live.peak


def fit_batch(
    name: str, needed: int, batch: int, size: tuple[int, int], how: RunSpec, model: torch.nn.Module | None = None
) -> tuple[int, Any]:
    """Halve the batch until it fits in memory; return its size and a prepared forward pass.

    Args:
        name: Name for the messages.
        needed: Bytes per image, see ``count_memory``.
        batch: Requested batch size.
        size: Height and width of an image.
        how: How to run the model.
        model: Model to try out; without it only ``needed`` counts.

    Raises:
        MemoryError: A single image does not fit; the message says how much it needs.
    """
    free, asked = available_bytes(how.device), batch
    while batch:
        try:
            if batch * needed < free:
                if batch < asked:
                    print(
                        f"{name}: batch {asked} needs about {asked * needed / 2**30:.1f} GiB with the {how.backend} "
                        f"backend, {free / 2**30:.1f} GiB are free: halved to {batch}",
                        file=sys.stderr,
                    )
                call = how.prepare(model, (batch, 3, *size)) if model else None
                if call:
                    call()
                return batch, call
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        batch //= 2
    raise MemoryError(
        f"{name} with the {how.backend} backend needs about {needed / 2**30:.1f} GiB for one image of "
        f"{size[0]}x{size[1]}, {free / 2**30:.1f} GiB are free: use a fused backend or a smaller image"
    )


def measure_memory(build: Callable[[], Callable[[], object]], device: str) -> float:
    """Measure the memory in MiB that a forward pass adds.

    Args:
        build: Returns the function to run; must be picklable, as on a CPU it is called in three fresh processes.
        device: ``cpu`` (Linux only) or ``cuda``.
    """
    if device == "cuda":
        run = build()
        run()  # allocates what persists, such as cuDNN's workspace
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return median(pool.map(_resident_mib, [(build, torch.get_num_threads())] * 3, chunksize=1))


def _resident_mib(task) -> float:
    build, threads = task
    torch.set_num_threads(threads)
    run = build()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak after building
    before = _resident_bytes("VmRSS")
    run()
    return (_resident_bytes("VmHWM") - before) / 2**20


def _resident_bytes(field: str) -> int:
    # getrusage would start at the peak of the parent process
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: CPU memory can be measured on Linux only")
