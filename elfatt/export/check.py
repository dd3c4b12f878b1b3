"""Export a model, keeping the file only if it reproduces PyTorch's outputs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from elfatt.export.runtimes import RUNTIMES, Run, Runtime
from elfatt.export.trace import example_size, export_model, frozen, size_limit
from elfatt.ops import use_backend

# maximum difference relative to max(1, largest output); int8 is judged by its accuracy instead
PRECISIONS = {"fp32": 1e-4, "fp16": 2e-2, "int8": float("inf")}


def export(
    model: nn.Module,
    runtime: str,
    path: str | Path,
    size: tuple[int, int] | None = None,
    precision: str = "fp32",
    images: Sequence[torch.Tensor] = (),
    batch_size: int = 1,
) -> list[tuple[tuple[int, ...], float]]:
    """Write a model for a runtime after comparing its outputs with PyTorch's on three shapes.

    Args:
        model: A float32 model of the package on the CPU; with ``size``, any classifier.
        runtime: One of ``RUNTIMES``.
        path: Output file; OpenVINO, and ONNX from 1.5 GiB, write the weights next to it.
        size: Fixed height and width in pixels; None for dynamic sizes from ``size_limit`` up.
        precision: One of ``PRECISIONS``.
        images: Normalised images ``[1, 3, H, W]`` for int8 calibration.
        batch_size: Batch size to tune for, in TensorRT.

    Returns:
        Input shapes, each with the maximum difference relative to ``max(1, largest output)``.

    Raises:
        ValueError: Unknown runtime, unsupported precision, wrong file extension, no calibration images, a batch size
            above the runtime's, or a model that cannot be exported.
        RuntimeError: A package is missing, the runtime fails, or outputs differ too much or are not finite; nothing is
            written.
    """
    path = Path(path)
    chosen = _check(runtime, path, precision, images, batch_size)
    if size is None and not chosen.dynamic:
        raise ValueError(f"{runtime} supports a fixed image size only: pass size (--size)")
    parameter = next(model.parameters())
    if (parameter.device.type, parameter.dtype) != ("cpu", torch.float32):
        found_on = f"{parameter.dtype} on {parameter.device}"
        raise ValueError(f"export needs a float32 model on the CPU, not {found_on}: call model.float().cpu()")
    with frozen(model):
        program = export_model(model, size, chosen.largest[0])
        if size is None:
            limit = size_limit(model)
            sizes = [(limit, limit), example_size(model)[::-1], (limit + 32, limit + 95)]
        else:
            sizes = [size] * 3
        path.parent.mkdir(parents=True, exist_ok=True)
        found: list[tuple[tuple[int, ...], float]] = []
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder, path.name)
            chosen.write(program, draft, precision, images, batch_size)
            try:
                run = chosen.load(draft)
                run(torch.zeros(1, 3, *sizes[0]))
            except Exception as error:  # of the runtime's own types
                raise RuntimeError(f"{runtime} cannot run the model: {' '.join(str(error).split())}") from error
            for batch, wanted in enumerate(sizes, start=1):
                shape = (batch, 3, *wanted)
                difference = _difference(model, run, shape)
                if math.isnan(difference):
                    remedy = "" if precision == "fp32" else ": use fp32"
                    problem = f"{runtime} in {precision} gives NaN or infinite outputs on {shape}{remedy}"
                    raise RuntimeError(f"{path} was not written: {problem}")
                if difference > PRECISIONS[precision]:
                    raise RuntimeError(
                        f"{runtime} differs from PyTorch by {difference:.1e} on {shape}, more than "
                        f"{PRECISIONS[precision]}: {path} was not written"
                    )
                found.append((shape, difference))
            del run
            for file in Path(folder).iterdir():
                file.replace(path.parent / file.name)
    return found


def _check(runtime: str, path: Path, precision: str, images: Sequence[torch.Tensor], batch_size: int) -> Runtime:
    """Validate the arguments and return the runtime."""
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime!r}: choose one of {', '.join(RUNTIMES)}")
    packages, suffix = RUNTIMES[runtime].packages, RUNTIMES[runtime].suffix
    if path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix} for {runtime}")
    if precision not in packages:
        raise ValueError(f"{runtime} does not support {precision}: choose one of {', '.join(packages)}")
    if precision == "int8" and not images:
        raise ValueError("int8 needs calibration images: pass images (--calibration FOLDER)")
    if batch_size > (largest := RUNTIMES[runtime].largest[0]):
        raise ValueError(f"{runtime} supports batches of up to {largest}, not {batch_size}")
    for package in packages[precision]:
        try:
            __import__(package)
        except ImportError as error:
            raise RuntimeError(f"{runtime} in {precision} needs {package}: pip install {package}") from error
    RUNTIMES[runtime].check()
    return RUNTIMES[runtime]


def _difference(model: nn.Module, run: Run, shape: tuple[int, ...]) -> float:
    """Return the maximum difference on random images, relative to ``max(1, largest output)``; NaN if not finite."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    with torch.inference_mode(), use_backend("math"):
        expected = model(images).numpy()
    found = run(images)
    if not np.isfinite(found).all():
        return math.nan
    return float(np.abs(found - expected).max() / max(1, np.abs(expected).max()))
