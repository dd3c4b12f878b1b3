"""VMamba: its parameters, its maps at any size, its scans against loops over paths, what timm asks of a model."""

import copy
import math

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor

from elfatt.analysis.complexity import measure_complexity
from elfatt.backbones.vmamba import PATHS, SS2D, cross_merge, cross_scan
from elfatt.integrations.openmmlab import TimmBackbone
from elfatt.ops import use_backend
from tests.references import vmamba_logits

SMALL = {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    return timm.create_model("vmamba_tiny", **{**SMALL, **options}).eval()


def randomized(model):
    """Noise on every parameter, so that no bias, norm or rate is idle."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_size_as_published():
    with torch.device("meta"):
        model = timm.create_model("vmamba_tiny")
    found = measure_complexity(model, (224, 224))
    assert f"{found.params / 1e6:.0f}" == "30"
    assert [f"{macs / 1e9:.2f}" for macs in (found.macs_nfa, found.macs_fa, found.macs_true)] == [
        "4.84",
        "4.84",
        "4.91",
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 4), (5, 3)])
def test_paths_run_along_rows_and_columns_both_ways(size):
    height, width = size
    x = torch.arange(height * width).reshape(1, height, width, 1)
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    paths = cross_scan(x)
    assert paths[0, :, :, 0].tolist() == [rows, columns, rows[::-1], columns[::-1]]
    assert torch.equal(cross_merge(paths, size), PATHS * x)


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (5, 9)])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_whole_model_equals_float64_loops(size, ratio):
    model = randomized(small(ssm_ratio=ratio))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    weights = {key: value.double() for key, value in model.state_dict().items()}
    expected = torch.stack([vmamba_logits(weights, image, depths=SMALL["depths"]) for image in x.double()])
    assert expected.std() > 0.1
    with torch.no_grad():
        for backend in ("auto", "reference", "math"):
            with use_backend(backend):
                assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (model.double()(x.double()) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("size", [(32, 32), (47, 90), (1, 1)])
def test_forward_and_every_gradient_at_any_size(size):
    model = small(drop_path_rate=0.1).train()
    out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 5)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_maps_of_odd_images():
    model = small(features_only=True)
    assert model.feature_info.channels() == [16, 32, 64, 128]
    for size in ((64, 96), (61, 117), (1, 33)):
        maps = model(torch.randn(1, 3, *size))
        for i, m in enumerate(maps):
            assert m.shape == (1, 16 * 2**i, *(math.ceil(side / 2 ** (i + 2)) for side in size))


@pytest.mark.parametrize("size", [(512, 2048), (800, 1333), (127, 333)])
def test_maps_of_the_dense_backbone(size):
    with torch.device("meta"):
        maps = TimmBackbone("vmamba_tiny")(torch.zeros(1, 3, *size))
    for i, m in enumerate(maps):
        assert m.shape == (1, 96 * 2**i, *(math.ceil(side / 2 ** (i + 2)) for side in size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    model = small()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        found = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < 0.05 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert (out.double() - expected).norm() < 0.05 * expected.norm()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_scans_start_as_mambas():
    op = SS2D(32, ratio=2.0, states=3)
    steps = torch.nn.functional.softplus(op.dt_projs_bias)
    assert 0.001 <= steps.min() < 0.003 and 0.05 < steps.max() <= 0.1001
    torch.testing.assert_close(op.A_logs.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(PATHS * 64, 3))
    assert (op.Ds == 1).all()


def test_weight_decay_spares_the_scans():
    spared = small().no_weight_decay()
    assert len(spared) == 3 * 6
    assert {name.rpartition(".")[2] for name in spared} == {"A_logs", "Ds", "dt_projs_bias"}


def test_gradient_checkpointing_changes_no_gradient():
    model = small().train()
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_fx_features():
    model = small().train()
    features = create_feature_extractor(model, ["stages.1.blocks.1.mlp", "norm"])
    x = torch.randn(2, 3, 40, 64)
    maps = list(features(x).values())
    torch.testing.assert_close(maps[-1], model.forward_features(x))


def test_graph_has_no_breaks():
    torch.compiler.reset()
    model = small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(compiled(x), model(x))
    gradients = [torch.autograd.grad(run(x).square().sum(), list(model.parameters())) for run in (compiled, model)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_channels_last_parameters():
    model = small()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
