"""A LePE that others have changed is called as a module, in every mechanism."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import elfatt

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

MECHANISMS = {
    "elfatt": {"block_size": 4},
    "effatt": {},
    "vanilla": {},
    "swin": {"window_size": 4},
    "cswin": {"stripe": 3},
    "agent": {"agents": 3},
    "flatten": {"lepe": True},
}
BACKENDS = ("auto", "sdpa", "math", "reference")


@pytest.fixture(params=MECHANISMS)
def mechanism(request):
    torch.manual_seed(0)
    module = elfatt.create_attention(request.param, dim=8, num_heads=2, **MECHANISMS[request.param]).eval()
    x = torch.randn(2, 7, 9, 8)  # no multiple of blocks

    def run(module=module, backend="auto"):
        with torch.no_grad(), elfatt.ops.use_backend(backend):
            return module(x)

    return module, run


@pytest.mark.parametrize("backend", BACKENDS)
def test_offloaded_weights_are_loaded(mechanism, backend):
    module, run = mechanism
    wanted = run(backend=backend)
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in module.parameters())
    torch.testing.assert_close(run(backend=backend), wanted, rtol=1e-5, atol=1e-6)


def test_every_submodule_is_called_if_watched(mechanism):
    module, run = mechanism
    wanted, called = run(), []
    for name, child in module.named_modules():
        child.register_forward_hook(lambda module, args, out, name=name: called.append(name))
    torch.testing.assert_close(run(), wanted, rtol=1e-5, atol=1e-6)
    assert set(called) == {name for name, _ in module.named_modules()}


def test_hooks_change_the_output(mechanism):
    module, run = mechanism
    for child in filters(module).values():
        child.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    other = copy.deepcopy(module)
    for child in filters(other).values():
        child._forward_hooks.clear()
        nn.init.zeros_(child.weight)
        nn.init.zeros_(child.bias)
    torch.testing.assert_close(run(), run(other), rtol=1e-5, atol=1e-6)


def test_lora_on_the_filters(mechanism):
    module, run = mechanism
    names = [name for name in filters(module)]
    if not names:
        pytest.skip("no LePE")
    before = run()
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=names, init_lora_weights=False), module)
    found = run()
    assert (found - before).abs().max() > 1e-3
    for name in names:
        module.set_submodule(name, Adapted(module.get_submodule(name)))
    torch.testing.assert_close(run(), found, rtol=1e-5, atol=1e-6)


class Adapted(nn.Module):
    """A LoRA's convolution, written out."""

    def __init__(self, layer):
        super().__init__()
        self.parts = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
        self.scaling = layer.scaling["default"]

    def forward(self, x):
        base, down, up = self.parts
        return base(x) + self.scaling * up(down(x))


class Scale(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("how", ["parametrization", "weight norm", "old weight norm", "assigned forward"])
def test_weights_that_are_computed(mechanism, how):
    module, run = mechanism
    other = copy.deepcopy(module)
    for child in filters(module).values():
        if how == "parametrization":
            parametrize.register_parametrization(child, "weight", Scale())
        elif how == "weight norm":
            parametrizations.weight_norm(child)
            child.parametrizations.weight.original0.data *= 2
        elif how == "old weight norm":
            nn.utils.weight_norm(child)
            child.weight_g.data *= 2
        else:
            child.forward = lambda x, child=child: nn.functional.conv2d(
                x, 2 * child.weight, child.bias, padding=child.padding, groups=child.groups
            )
    for child in filters(other).values():
        child.weight.data *= 2
    torch.testing.assert_close(run(), run(other), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cswin_nano_elfatt", "vmamba_tiny"])
def test_whole_models_offloaded(name):
    torch.manual_seed(0)
    options = {"depths": (1, 1, 1, 1)} if name == "vmamba_tiny" else {}
    model, x = timm.create_model(name, num_classes=3, **options).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def filters(module):
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Conv2d)}
