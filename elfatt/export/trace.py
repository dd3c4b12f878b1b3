"""Trace models with ``torch.export``, with dynamic batch, height and width."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from elfatt.attention.cswin import CSWinAttention
from elfatt.attention.elfatt import ELFATT
from elfatt.attention.swin import SwinAttention
from elfatt.backbones.hierarchical import HierarchicalTransformer
from elfatt.conversion.handle import handle_of
from elfatt.ops import use_backend

LARGEST = 4096  # images, pixels a side


def size_limit(model: nn.Module) -> int:
    """Return the minimum height and width of a dynamic graph, in pixels.

    On smaller images a block or window covers the whole map and is computed differently: pass ``size``.

    Raises:
        ValueError: Another kind of model.
    """
    if not isinstance(model, HierarchicalTransformer):
        raise ValueError(f"{type(model).__name__} supports a fixed image size only: pass size (--size)")
    sides = [(needed - 1) * 4 * 2**stage + 1 for stage, _, needed in _cuts(model)]
    return max([64, *sides])  # torch.export treats a side of one token as constant


def export_model(
    model: nn.Module, size: tuple[int, int] | None = None, largest_batch: int = LARGEST
) -> ExportedProgram:
    """Trace a model with dynamic batch, height and width.

    Args:
        model: A model of the package; with ``size``, any classifier.
        size: Fixed height and width in pixels; None for dynamic sizes.
        largest_batch: Largest batch size.

    Raises:
        ValueError: Without ``size``, a model of another package, a converted one, or one with stripes.
    """
    shape = {0: Dim("batch", min=1, max=largest_batch)}
    if size is None:
        sides = {"min": size_limit(model), "max": LARGEST}
        if handle_of(model):
            raise ValueError("a converted model supports a fixed image size only: pass size (--size)")
        if any(isinstance(module, CSWinAttention) and module.stripe > 1 for module in model.modules()):
            raise ValueError("CSWin's stripes support a fixed image size only: pass size (--size)")
        size = example_size(model)
        shape |= {2: Dim("height", **sides), 3: Dim("width", **sides)}
    image = torch.zeros(3, 3, *size, device=next(model.parameters()).device, dtype=torch.float32)
    # with symbolic shapes, looking up fake tensors costs more than computing them again
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with frozen(model), use_backend("math"), uncached:
        program = torch.export.export(
            model, (image,), dynamic_shapes=(shape,), prefer_deferred_runtime_asserts_over_guards=True
        )
    # they only assert the example's strides at other sizes; export() checks the outputs instead
    for node in [n for n in program.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]:
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients and PyTorch's default dtype to float32, and back."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


def _stages(model: nn.Module) -> nn.Sequential:
    return cast(nn.Sequential, model.stages)


def _cuts(model: nn.Module) -> list[tuple[int, int, int]]:
    """Return (stage, block or window size, minimum side of the map) of windowed attentions, in tokens."""
    cuts = set()
    for stage, blocks in enumerate(_stages(model)):
        for module in blocks.modules():
            if isinstance(module, ELFATT) and module.global_channels < module.dim:
                cuts.add((stage, module.block_size, module.block_size))
            elif isinstance(module, SwinAttention):
                cuts.add((stage, module.window_size, module.window_size + 1))  # a single window is not shifted
    return sorted(cuts)


def example_size(model: nn.Module) -> tuple[int, int]:
    """Return a height and width at which every map is odd and padded, so that the trace takes no shortcuts."""
    divisors = {(stage, side) for stage, side, _ in _cuts(model)} | {(stage, 2) for stage in range(len(_stages(model)))}
    sides = (
        side
        for side in itertools.count(size_limit(model))
        if side % 4 and all(-(-side // (4 * 2**stage)) % divisor for stage, divisor in divisors if divisor > 1)
    )
    height = next(sides)
    return height, next(side for side in sides if side > height + 32)
