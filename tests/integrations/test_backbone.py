"""The backbone of both dense frameworks: its maps, its freezing, its pretrained weights."""

import pytest
import timm
import torch

from elfatt import create_attention
from elfatt.integrations import openmmlab
from elfatt.integrations.openmmlab import TimmBackbone
from tests.references import elfatt_maps, normalize


@pytest.mark.parametrize("size", [(512, 2048), (800, 1333), (127, 333)])
@pytest.mark.parametrize("name", ["swin_tiny_elfatt", "cswin_tiny_elfatt", "swin_tiny_local", "swin_tiny_agent"])
def test_maps_have_their_strides(name, size):
    with torch.device("meta"):
        maps = TimmBackbone(name, block_size=14)(torch.zeros(1, 3, *size))
    patch = name in ("swin_tiny_local", "swin_tiny_agent")  # the others have CSWin's 7 × 7 stem with a padding of 2
    sides = [-(-side // 4) if patch else (side - 3) // 4 + 1 for side in size]
    for i, m in enumerate(maps):
        assert m.shape == (1, maps[0].shape[1] * 2**i, *(-(-side // 2**i) for side in sides))


def test_each_map_is_normed():
    maps = TimmBackbone("cswin_nano_elfatt")(torch.rand(1, 3, 61, 90))
    for m in maps:
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "eps"),
    [("swin_nano_elfatt", 1e-5), ("cswin_nano_elfatt", 1e-5), ("vmamba_tiny", 1e-5), ("convnext_atto", 1e-6)],
)
def test_maps_are_normed_with_the_models_own_epsilon(name, eps):
    model = TimmBackbone(name)
    faint = torch.tensor([1e-3, -1e-3]).repeat(400)  # of variance 1e-6
    maps = [faint[:c].view(1, c, 1, 1) for c in model.features.feature_info.channels()]
    model.features.forward = lambda image: maps
    for found, given in zip(model(None), maps, strict=True):
        torch.testing.assert_close(found, given / (1e-6 + eps) ** 0.5)


@pytest.mark.parametrize("name", ["swin_tiny_elfatt", "cswin_tiny_elfatt"])
def test_maps_of_an_odd_image_equal_float64(name):
    """Sides of 15×29, 8×15, 4×8 and 2×4 tokens: no block of 7 or 3 divides the first three."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4)}
    model = TimmBackbone(name, **sizes, block_size=(7, 7, 3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(1, 3, 61, 117)
    weights = {key: value.double() for key, value in model.features.model.state_dict().items()}
    maps = elfatt_maps(
        weights, image[0].double(), levels=("E", "EE", "VE", "V"), num_heads=(2, 2, 4, 4), block_size=(7, 7, 3, 3)
    )
    norms = {key: value.double() for key, value in model.norms.state_dict().items()}
    with torch.no_grad():
        found = model(image)
    for i, (a, b) in enumerate(zip(found, maps, strict=True)):
        expected = normalize(norms, str(i), b).permute(2, 0, 1)
        assert a.shape[1:] == expected.shape
        assert (a[0] - expected).abs().max() <= 1e-5


def test_frozen_stages_and_checkpointing():
    model = TimmBackbone("cswin_nano_elfatt", frozen_stages=2, with_cp=True, drop_path_rate=0.5).train()
    sum(m.sum() for m in model(torch.rand(1, 3, 64, 64))).backward()
    net = model.features.model
    for part, frozen in ((net.stem, True), (net.stages[1], True), (net.stages[2], False), (model.norms, False)):
        assert all((p.grad is None) == frozen for p in part.parameters()) and part.training != frozen


def test_pretrained_weights_load_loudly(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(openmmlab, "print_log", lambda line, logger: lines.append(line))
    source = timm.create_model("cswin_nano_elfatt", num_classes=7)
    raw = {key: torch.zeros_like(value) for key, value in source.state_dict().items()}
    path = tmp_path / "classifier.pth.tar"
    torch.save({"state_dict": raw, "state_dict_ema": source.state_dict()}, path)
    model = TimmBackbone("cswin_nano_elfatt", pretrained=str(path))
    model.init_weights()
    own = model.features.model.state_dict()
    assert f"{len(own)} of {len(own)} tensors matched" in lines[0]
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in own.items())

    torch.save({"state_dict": {k: v for k, v in raw.items() if "stages.2" not in k}}, path)
    with pytest.raises(ValueError, match="missing"):
        model.init_weights()
    with pytest.raises(ValueError, match="both name weights"):
        TimmBackbone("cswin_nano_elfatt", pretrained="a", init_cfg={"type": "Pretrained", "checkpoint": "b"})


def test_fewer_levels_take_what_they_need_of_the_weights(tmp_path):
    path, source = tmp_path / "classifier.pth", timm.create_model("cswin_nano_elfatt")
    torch.save(source.state_dict(), path)
    model = TimmBackbone("cswin_nano_elfatt", out_indices=(0, 2), pretrained=str(path))
    model.init_weights()
    own = model.features.model.state_dict()
    assert any("stages.2." in key for key in own) and not any("stages.3." in key for key in own)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in own.items())
    assert [m.shape[1:] for m in model(torch.rand(1, 3, 64, 64))] == [(32, 16, 16), (128, 4, 4)]


def test_a_model_without_stages_cannot_be_frozen():
    with pytest.raises(ValueError, match=r"frozen_stages=0: resnet18 has no 'stem' and 'stages'"):
        TimmBackbone("resnet18", frozen_stages=0)


def test_position_tables_are_resized(tmp_path):
    path = tmp_path / "small.pth"
    torch.save(timm.create_model("swin_tiny_flatten", img_size=64).state_dict(), path)
    TimmBackbone("swin_tiny_flatten", img_size=96, pretrained=str(path)).init_weights()


def test_agents_of_another_grid_use_resized_tables():
    attention = {"dim": 8, "num_heads": 2, "feat_size": (6, 6)}
    small = create_attention("agent", **attention, agents=5, tables=3)
    large = create_attention("agent", **attention, agents=5)
    state = small.state_dict()
    for key, axes in (("an_bias", 1), ("na_bias", 1), ("ah_bias", 1), ("aw_bias", 1), ("ha_bias", 3), ("wa_bias", 3)):
        table = state[key].movedim(axes, -1)
        grid = table.reshape(1, -1, 3, 3)
        grid = torch.nn.functional.interpolate(grid, size=(5, 5), mode="bilinear")
        state[key] = grid.reshape(*table.shape[:-1], 25).movedim(-1, axes)
    large.load_state_dict(state)
    x = torch.rand(1, 9, 7, 8)
    torch.testing.assert_close(small(x), large(x))


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="unknown model 'vmamba_tinny'; did you mean 'vmamba_tiny'?"):
        TimmBackbone("vmamba_tinny")
