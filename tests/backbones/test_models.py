"""The timm entry points: what timm's generic model tests ask for (but TorchScript), any image size, every backend."""

import copy
import warnings

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor

import elfatt
from elfatt.ops import use_backend

SMALL = {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4), "img_size": 64, "num_classes": 5}
TINY = [name for name in elfatt.list_models() if "_tiny_" in name]


def small(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options}).eval()


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


def test_all_models_of_the_paper_are_registered():
    sizes, mechanisms = (
        ("swin_tiny", "swin_base", "cswin_tiny", "cswin_base"),
        (
            "elfatt",
            "effatt",
            "global",
            "local",
            "agent",
            "flatten",
        ),
    )
    expected = {f"{size}_{mechanism}" for size in sizes for mechanism in mechanisms}
    assert set(elfatt.list_models()) == expected | {"cswin_nano_elfatt", "swin_nano_elfatt", "vmamba_tiny"}
    assert set(elfatt.list_models()) <= set(timm.list_models())


@pytest.mark.parametrize("name", elfatt.list_models())
def test_any_image_size_on_meta(name):
    model = on_meta(name)
    for size in ((32, 32), (127, 333), (512, 2048)):
        assert model(torch.empty(1, 3, *size, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize("name", elfatt.list_models())
def test_default_cfg_names_real_parameters(name):
    model = on_meta(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, *cfg["pool_size"], model.num_features)


@pytest.mark.parametrize("name", [*TINY, "vmamba_tiny"])
def test_an_empty_batch_gives_no_logits_and_zero_gradients(name):
    model = timm.create_model(name, embed_dim=48, depths=(1, 1, 2, 1), num_classes=5)
    for backend in ("reference", "plain", "math", "sdpa", "auto"):
        model.zero_grad()
        with use_backend(backend):
            logits = model(torch.zeros(0, 3, 32, 32))
            logits.sum().backward()
        assert logits.shape == (0, 5), backend
        assert not any(p.grad.count_nonzero() for p in model.parameters()), backend


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(32, 32), (47, 90)], ids=str)
def test_forward_and_every_gradient_at_any_size(name, size):
    model = small(name, drop_path_rate=0.1).train()
    out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 5)
    out.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@pytest.mark.parametrize("name", TINY)
def test_whole_model_equals_float64_under_every_backend(name):
    model = small(name)
    x = torch.randn(2, 3, 72, 56, generator=torch.Generator().manual_seed(0))

    def outputs(model, x):
        model = copy.deepcopy(model)
        out = model(x)
        out.square().sum().backward()
        return [out.detach()] + [p.grad for p in model.parameters()]

    with use_backend("reference"):
        expected = outputs(copy.deepcopy(model).double(), x.double())
    for backend in ("reference", "math", "sdpa", "auto"):
        with use_backend(backend):
            found = outputs(model, x)
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1), backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_whole_model_in_low_precision(name, dtype):
    """At most twice the error that PyTorch's own low precision makes with the formula as it stands."""
    model = small(name)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype))
    with torch.no_grad():
        found = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert (found.double() - expected).norm() <= 2 * (plain.double() - expected).norm()


@pytest.mark.parametrize("name", TINY)
def test_feature_maps(name):
    model = small(name, features_only=True)
    assert model.feature_info.channels() == [16, 32, 64, 128]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 24), (2, 32, 8, 12), (2, 64, 4, 6), (2, 128, 2, 3)]
    chosen = small(name, features_only=True, out_indices=(1, 2))
    assert [m.shape[1] for m in chosen(torch.randn(1, 3, 64, 64))] == [32, 64]


def test_forward_intermediates_agree_with_the_model():
    model = small("cswin_tiny_elfatt")
    x = torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    normed = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(normed[0], final)
    early, some = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    torch.testing.assert_close(some[1], maps[1])
    assert early.shape == (1, 8, 8, 32)
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_the_chosen_stages():
    model = small("cswin_tiny_elfatt")
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2
    torch.testing.assert_close(model(x), expected.permute(0, 2, 3, 1))


def test_classifier_can_be_replaced_and_removed():
    model = small("swin_tiny_local")
    x = torch.randn(2, 3, 64, 64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 2, 2, model.num_features)


@pytest.mark.parametrize("name", ["cswin_tiny_elfatt", "swin_tiny_agent", "cswin_tiny_flatten", "swin_tiny_local"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = small(name).train()
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_grows_to_the_rate_of_the_last_block():
    model = small("cswin_tiny_elfatt", drop_path_rate=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.06, 0.12, 0.18, 0.24, 0.3])


def test_weight_decay_spares_position_bias_tables():
    model = small("swin_tiny_local")
    spared = model.no_weight_decay()
    assert len(spared) == 6
    assert all(name.endswith("relative_position_bias_table") for name in spared)


def test_other_image_channels():
    assert small("swin_tiny_elfatt", in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_published_options_follow_the_training_resolution():
    def sides(name, option, img_size):
        stages = on_meta(name, img_size=img_size).stages
        return [side for stage in stages for side in {getattr(block.attn, option, 0) for block in stage.blocks} - {0}]

    assert sides("cswin_base_local", "stripe", 224) == [1, 2, 7]
    assert sides("cswin_base_local", "stripe", 384) == [1, 2, 12]
    assert sides("cswin_tiny_elfatt", "block_size", 224) == [7, 7, 14]
    assert sides("cswin_base_elfatt", "block_size", 384) == [24, 24, 24]
    assert sides("cswin_tiny_elfatt", "block_size", 512) == [7, 7, 14]


@pytest.mark.parametrize("name", TINY)
def test_torch_fx_features(name):
    """timm traces models for features; attentions and padding stems are leaves of the graph."""
    model = small(name).train()
    features = create_feature_extractor(model, ["stages.1.blocks.1.mlp", "norm"])
    x = torch.randn(2, 3, 40, 64)
    maps = list(features(x).values())
    torch.testing.assert_close(maps[-1], model.forward_features(x))
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("head"))


@pytest.mark.parametrize("name", TINY)
def test_channels_last_parameters(name):
    model = small(name)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_can_be_assigned_to_a_model_made_on_meta():
    source = small("swin_tiny_local")
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_local", **SMALL).eval()
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("name", TINY)
def test_graph_has_no_breaks(name):
    torch.compiler.reset()
    model = small(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(compiled(x), model(x))


def size_warnings(run):
    """The warnings of ``run()`` that name the size of an image."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "traced for images" in str(w.message)]


@pytest.mark.parametrize(("name", "features"), [*((name, False) for name in TINY), ("cswin_tiny_elfatt", True)])
def test_a_trace_names_the_size_it_holds_for(name, features):
    model = timm.create_model(name, embed_dim=48, depths=(1, 1, 1, 1), features_only=features).eval()
    x, traced = torch.randn(1, 3, 64, 48), []
    with torch.no_grad():
        found = size_warnings(lambda: traced.append(torch.jit.trace(model, x, check_trace=False)))
        assert len(found) == 1 and found[0].startswith("traced for images of 64×48 pixels (height × width) only")
        torch.testing.assert_close(traced[0](x), model(x))
        assert not size_warnings(lambda: (model(x), traced[0](x)))


def test_only_a_trace_warns_of_its_size():
    model, x = small("swin_tiny_elfatt", depths=(1, 1, 1, 1)), torch.randn(1, 3, 64, 64)
    torch._dynamo.reset()
    assert not size_warnings(lambda: torch.compile(model, backend="eager")(x))
    assert not size_warnings(lambda: torch.export.export(model, (x,)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": "EEV"}, "must have 4 patterns"),
        ({"levels": "EEXV"}, "level 'X' does not describe 2 blocks"),
        ({"levels": ("E", "E", "EVE", "V")}, "level 'EVE' does not describe 2 blocks"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": (7, 7, 7, 7, 7)}, "one per stage"),
        ({"num_heads": (3, 3, 3, 3)}, "dim=16 cannot be split into num_heads=3"),
        ({"stem": "pool"}, "unknown stem 'pool'"),
    ],
)
def test_bad_values_are_named(options, words):
    with pytest.raises((ValueError, KeyError), match=words):
        small("cswin_tiny_elfatt", **options)


def test_an_image_too_small_is_named():
    with pytest.raises(ValueError, match="1x1 pixels is too small: use at least 3x3"):
        small("cswin_tiny_elfatt")(torch.randn(1, 3, 1, 1))
