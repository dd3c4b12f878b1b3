"""Memory of a forward pass: counted on the meta device for any image size, or measured."""

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
    """Track the bytes of live intermediate tensors.

    What an operation takes for itself while it runs is not seen.

    Attributes:
        peak: Most bytes alive at one time.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, None)  # weights and images: their views are no new memory
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
    """Peak bytes of intermediate tensors in a forward pass, counted without running it.

    Args:
        model: On the ``meta`` device, in evaluation mode.
        shape: Of the images, ``[B, 3, H, W]``.
        backend: Of the operations; a fused attention operator holds its operands and its output only.
        dtype: Of the model, which is changed, and of the images.
        backward: Keep what the backward pass needs, weights' gradients aside.
    """
    model = model.to(dtype)
    image = torch.empty(shape, dtype=dtype, device="meta")
    fused = nullcontext() if backend == "math" else FusedAttention()
    with torch.inference_mode(not backward), use_backend(backend), LiveTensors() as live, fused:
        out = model(image)
    del out  # alive until here, and with it what the backward pass would need
    return live.peak


def fit_batch(
    name: str, needed: int, batch: int, size: tuple[int, int], how: RunSpec, model: torch.nn.Module | None = None
) -> tuple[int, Any]:
    """Halve the batch until it fits in memory; return it with a prepared pass.

    Args:
        name: For the message.
        needed: Bytes of one image, see ``count_memory``.
        batch: Images asked for.
        size: Height and width of an image.
        how: How the model runs.
        model: It runs once; without it the count alone decides.

    Raises:
        MemoryError: One image does not fit; what it needs is named.
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
        f"{size[0]}x{size[1]}, {free / 2**30:.1f} GiB are free: take a fused backend or a smaller image"
    )


def measure_memory(build: Callable[[], Callable[[], object]], device: str) -> float:
    """Memory in MiB that a forward pass adds.

    Args:
        build: Makes what is to be run; picklable, since on a CPU each of three fresh processes calls it.
        device: ``cpu`` (Linux only) or ``cuda``.
    """
    if device == "cuda":
        run = build()
        run()  # what stays, such as cuDNN's workspace, is there before the second
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
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the building
    before = _resident_bytes("VmRSS")
    run()
    return (_resident_bytes("VmHWM") - before) / 2**20


def _resident_bytes(field: str) -> int:
    # not getrusage: its peak starts at that of the parent process
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: memory on a CPU can be measured on Linux only")
