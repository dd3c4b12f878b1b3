"""Gradients have the strides of their parameters, whatever the operators chose."""

import copy

import pytest
import timm
import torch

import elfatt  # noqa: F401  registers the models with timm
from elfatt.layers import align_gradients
from elfatt.ops import use_backend

SMALL = {"depths": [1, 1, 1, 1], "num_classes": 3}
MODELS = {n: {**SMALL, "embed_dim": 16} for n in elfatt.list_models() if n.startswith("cswin_tiny_")}
MODELS |= {"vmamba_tiny": {**SMALL, "embed_dim": 16}, "convnext_tiny": {**SMALL, "dims": [16, 32, 64, 128]}}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_aligned(name, backend, layout):
    torch.manual_seed(0)
    plain = timm.create_model(name, **MODELS[name]).to(memory_format=layout)
    aligned = copy.deepcopy(plain)
    align_gradients(aligned)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
    for model in (plain, aligned):
        with use_backend(backend):
            model(images).square().mean().backward()
    for (key, parameter), other in zip(aligned.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad.stride() == parameter.stride(), key
        assert torch.equal(parameter.grad, other.grad), key


def test_frozen_parameters_stay_as_they_are():
    model = torch.nn.Conv2d(4, 4, 1).requires_grad_(False)
    align_gradients(model)
    assert model.weight._backward_hooks is None


class Given(torch.autograd.Function):
    """Gives a weight the gradient that stands ready."""

    @staticmethod
    def forward(ctx, x, weight, gradient):
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream, ctx.gradient, None


def test_a_gradient_of_another_layout_and_none_at_all():
    model = torch.nn.Conv2d(2, 4, (1, 3), bias=False)
    align_gradients(model)
    x = torch.ones(1, requires_grad=True)
    Given.apply(x, model.weight, None).backward()
    assert model.weight.grad is None
    transposed = torch.randn(3, 1, 2, 4).permute(3, 2, 1, 0)
    Given.apply(x, model.weight, transposed).backward()
    assert torch.equal(model.weight.grad, transposed) and model.weight.grad.stride() == model.weight.stride()
