"""``python -m elfatt.export``: a model as a file for another runtime, checked against PyTorch before it is kept.

The graph has standard operators only. Batch, height and width are dynamic from ``size_limit`` up; CSWin's stripes
support a single image size.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from timm.utils import ParseKwargs
from torch import nn
from torch.export import Dim, ExportedProgram

from elfatt.attention.cswin import CSWinAttention
from elfatt.attention.elfatt import ELFATT
from elfatt.attention.swin import SwinAttention
from elfatt.backbones.hierarchical import HierarchicalTransformer
from elfatt.backbones.zoo import check_model
from elfatt.checkpoints import load_checkpoint
from elfatt.ops import use_backend

LARGEST = 4096  # pixels
TOLERANCE = 1e-4  # relative to the largest output, or to 1
OPSET = 20
Run = Callable[[torch.Tensor], np.ndarray]


def size_limit(model: HierarchicalTransformer) -> int:
    """Smallest height and width in pixels that a dynamic graph accepts.

    On a smaller image a block or window covers the whole map and is computed differently: pass ``size``.
    """
    sides = [(needed - 1) * 4 * 2**stage + 1 for stage, _, needed in _cuts(model)]
    return max([64, *sides])  # torch.export takes a side of one token for a constant


def export_model(model: nn.Module, size: tuple[int, int] | None = None) -> ExportedProgram:
    """Trace a model with dynamic batch, height and width.

    Args:
        model: A model of the package; with ``size``, any classifier.
        size: Fixed height and width in pixels; None for dynamic ones.

    Raises:
        ValueError: Without ``size``, another kind of model, or one with stripes.
    """
    model = model.eval().requires_grad_(False)
    shape = {0: Dim("batch", min=1, max=LARGEST)}
    if size is None:
        if not isinstance(model, HierarchicalTransformer):
            raise ValueError(f"{type(model).__name__} supports a fixed image size only: pass size (--size)")
        if any(isinstance(module, CSWinAttention) and module.stripe > 1 for module in model.modules()):
            raise ValueError("CSWin's stripes support a fixed image size only: pass size (--size)")
        size = _examples(model)
        sides = {"min": size_limit(model), "max": LARGEST}
        shape |= {2: Dim("height", **sides), 3: Dim("width", **sides)}
    image = torch.zeros(3, 3, *size, device=next(model.parameters()).device)
    with use_backend("math"):
        program = torch.export.export(
            model, (image,), dynamic_shapes=(shape,), prefer_deferred_runtime_asserts_over_guards=True
        )
    # they only assert that other sizes have the example's strides, which export() checks by its outputs
    for node in [n for n in program.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]:
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def write_torch_export(program: ExportedProgram, path: Path) -> None:
    """Write a ``.pt2`` file."""
    torch.export.save(program, path)


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write a single ``.onnx`` file."""
    names = {"input_names": ["image"], "output_names": ["output"]}
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, opset_version=OPSET, verbose=False, **names)


def write_openvino(program: ExportedProgram, path: Path) -> None:
    """Write an ``.xml`` file and its weights, ``.bin``, in float32."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(program, Path(folder, "model.onnx"))
        openvino.save_model(openvino.convert_model(Path(folder, "model.onnx")), path, compress_to_fp16=False)


def load_torch_export(path: Path) -> Run:
    """Runner of a ``.pt2`` file."""
    module = torch.export.load(path).module()
    return lambda images: module(images).numpy()


def load_onnx(path: Path) -> Run:
    """Runner of an ``.onnx`` file: onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images.numpy()})[0]


def load_openvino(path: Path) -> Run:
    """Runner of an ``.xml`` file: OpenVINO on the CPU, in float32."""
    import openvino

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: model(images.numpy())[0]


# required packages, file suffix, writer, loader
RUNTIMES = {
    "torch-export": ((), ".pt2", write_torch_export, load_torch_export),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), ".onnx", write_onnx, load_onnx),
    "openvino": (("onnx", "onnxscript", "openvino"), ".xml", write_openvino, load_openvino),
}


def export(
    model: nn.Module, runtime: str, path: str | Path, size: tuple[int, int] | None = None
) -> list[tuple[tuple[int, ...], float]]:
    """Write a model for a runtime after comparing its outputs with PyTorch's on three shapes.

    Args:
        model: A model of the package; with ``size``, any classifier.
        runtime: One of ``RUNTIMES``.
        path: The file; OpenVINO puts its weights beside it.
        size: Fixed height and width in pixels; None for dynamic ones from ``size_limit`` up.

    Returns:
        Input shapes and the largest difference on each, relative to the largest output or to 1.

    Raises:
        ValueError: Unknown runtime, a path with another ending, or a model that cannot be exported.
        RuntimeError: A package is missing, or an output differs by more than ``TOLERANCE``; nothing is written.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime!r}: choose one of {', '.join(RUNTIMES)}")
    packages, suffix, write, load = RUNTIMES[runtime]
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix} for {runtime}")
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise RuntimeError(f"{runtime} needs {' '.join(packages)}: pip install {package}") from error
    program = export_model(model, size)
    sizes = [size] * 3
    if size is None:
        limit = size_limit(model)
        sizes = [(limit, limit), _examples(model)[::-1], (limit + 32, limit + 95)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder, path.name)
        write(program, draft)
        run, found = load(draft), []
        for batch, wanted in enumerate(sizes, start=1):
            images = torch.randn(batch, 3, *wanted, generator=torch.Generator().manual_seed(batch))
            with torch.inference_mode(), use_backend("math"):
                expected = model(images).numpy()
            difference = float(np.abs(run(images) - expected).max() / max(1, np.abs(expected).max()))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{runtime} differs from PyTorch by {difference:.1e} on {tuple(images.shape)}, more than "
                    f"{TOLERANCE}: {path} was not written"
                )
            found.append((tuple(images.shape), difference))
        del run
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    return found


def _cuts(model: nn.Module) -> list[tuple[int, int, int]]:
    """For each attention that cuts its map: stage, side of the cut, and the side that the map must have, in tokens."""
    cuts = set()
    for stage, blocks in enumerate(model.stages):
        for module in blocks.modules():
            if isinstance(module, ELFATT) and module.global_channels < module.dim:
                cuts.add((stage, module.block_size, module.block_size))
            elif isinstance(module, SwinAttention):
                cuts.add((stage, module.window_size, module.window_size + 1))  # a single window is not shifted
    return sorted(cuts)


def _examples(model: nn.Module) -> tuple[int, int]:
    """A height and width at which every map is odd and padded, so that the trace takes no shortcut."""
    divisors = {(stage, side) for stage, side, _ in _cuts(model)} | {(stage, 2) for stage in range(len(model.stages))}
    sides = (
        side
        for side in itertools.count(size_limit(model))
        if side % 4 and all(-(-side // (4 * 2**stage)) % divisor for stage, divisor in divisors if divisor > 1)
    )
    height = next(sides)
    return height, next(side for side in sides if side > height + 32)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m elfatt.export", description=__doc__.split(": ", 1)[1])
    add = parser.add_argument
    add("model", help="a model of elfatt.list_models(), or with --size any of timm")
    add("--to", required=True, choices=RUNTIMES, help="the runtime")
    add("--checkpoint", type=Path, help="weights; random ones without it")
    add("--output", type=Path, help="the file (default: the model's name)")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="fixed image size (default: dynamic)")
    add("--num-classes", type=int, default=1000, help="classes (default: %(default)s)")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as block_size=7")
    args = parser.parse_args(argv)
    try:
        check_model(args.model)
        model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
        if args.checkpoint:
            load_checkpoint(model, args.checkpoint)
        path = args.output or Path(args.model + RUNTIMES[args.to][1])
        size = tuple(args.size) if args.size else None
        for shape, difference in export(model, args.to, path, size):
            print(f"{'×'.join(map(str, shape))}: differs from PyTorch by {difference:.1e}")
        images = f"{size[0]}×{size[1]} pixels" if size else f"{size_limit(model)} to {LARGEST} pixels a side"
        print(f"wrote {path}: any batch of images of {images}")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
