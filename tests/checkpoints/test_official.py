"""Official names against official arithmetic: what a converted checkpoint computes, and that nothing of it is lost."""

import pytest
import timm
import torch

from classification.runtime import load_weights
from elfatt.backbones.zoo import model_options
from elfatt.checkpoints import LoadReport, convert_state_dict, load_checkpoint
from elfatt.integrations.openmmlab import TimmBackbone
from tests.checkpoints.official import (
    SHAPES,
    SOURCES,
    convnext_logits,
    convnext_shapes,
    cswin_shapes,
    drawn,
    official,
    official_logits,
    plan,
    randomized,
    small_model,
    vmamba_logits,
    vmamba_shapes,
)

DIMS, DEPTHS = (16, 32, 64, 128), (1, 2, 1, 1)
TINY = (96, 192, 384, 768)
# source, official shapes, official arithmetic, our model and its keywords; small, at each VMamba's ratio
OTHERS = {
    "vmamba s1": (
        "VMamba",
        vmamba_shapes(DIMS, DEPTHS, 1.0, 5),
        vmamba_logits,
        "vmamba_tiny",
        {"embed_dim": 16, "depths": DEPTHS},
    ),
    "vmamba s2": (
        "VMamba",
        vmamba_shapes(DIMS, DEPTHS, 2.0, 5),
        vmamba_logits,
        "vmamba_tiny",
        {"embed_dim": 16, "depths": DEPTHS, "ssm_ratio": 2.0},
    ),
    "convnext": (
        "Facebook ConvNeXt",
        convnext_shapes(DIMS, DEPTHS, 5),
        convnext_logits,
        "convnext_tiny",
        {"dims": DIMS, "depths": DEPTHS},
    ),
}
PUBLISHED = {
    "vmamba_tiny_s1l8": (vmamba_shapes(TINY, (2, 2, 8, 2), 1.0, 1000), "vmamba_tiny", {}),
    "vmamba_tiny_s2l5": (
        vmamba_shapes(TINY, (2, 2, 5, 2), 2.0, 1000),
        "vmamba_tiny",
        {"depths": (2, 2, 5, 2), "ssm_ratio": 2.0},
    ),
    "convnext_tiny_1k": (convnext_shapes(TINY, (3, 3, 9, 3), 1000), "convnext_tiny", {}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_official_weights_give_the_official_output(name, tmp_path):
    stages, state = official(name)
    torch.save({"model": state}, tmp_path / "official.pth")
    model = small_model(name)
    report = load_checkpoint(model, tmp_path / "official.pth")
    assert report == LoadReport(SOURCES[name], "raw", len(model.state_dict()), (), ())
    image = torch.randn(2, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = official_logits(name.split("_")[0], stages, state, image), model(image)
    assert expected.std() > 0.1  # a dead network would agree too
    print(f"{name}: largest difference {(found - expected).abs().max():.1e}")
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("size", "img_size"), [("tiny", 224), ("base", 384)])
@pytest.mark.parametrize("name", SOURCES)
def test_published_sizes_convert_with_nothing_left_over(name, img_size, size):
    shell, mechanism = name.split("_")
    full_name = f"{shell}_{size}_{mechanism}"
    with torch.device("meta"):
        model = timm.create_model(full_name, img_size=img_size)
    shapes = SHAPES[shell](plan(name, model_options(full_name, img_size), img_size), 1000)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted, source, *_ = convert_state_dict(state, model)
    assert source == SOURCES[name]
    own = model.state_dict()
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in own.items()}


@pytest.mark.parametrize("depths", [(2, 4, 18, 1), (1, 2, 21, 1)])  # the paper's, and the one Microsoft published
def test_full_cswin_tiny_loads_every_tensor(depths, tmp_path):
    stages = plan("cswin_local", model_options("cswin_tiny_local") | {"depths": depths}, 224)
    state = {key: torch.randn(shape) for key, shape in cswin_shapes(stages, 1000).items()}
    torch.save({"state_dict_ema": state}, tmp_path / "cswin.pth")
    model = timm.create_model("cswin_tiny_local", depths=depths)
    report = load_checkpoint(model, tmp_path / "cswin.pth")
    assert (report.source, report.weights, report.matched) == ("microsoft CSWin", "ema", len(state))
    assert torch.equal(model.stages[2].blocks[17].attn.lepe_horizontal.weight, state["stage3.17.attns.1.get_v.weight"])


@pytest.mark.parametrize(
    ("image", "window", "depths", "dim"),
    [
        ((224, 224), 7, (2, 2, 6, 2), 96),
        ((448, 224), 7, (2, 2, 2, 2), 32),  # one window covers one side of the last map only
        ((232, 200), 7, (1, 1, 1, 1), 32),  # nothing divides; timm pads shifted maps otherwise, so none is shifted
        ((384, 384), 12, (1, 2, 2, 1), 32),
    ],
)
def test_timm_swin_gives_timm_logits(image, window, depths, dim, tmp_path):
    heads = (3, 6, 12, 24) if dim == 96 else (2, 4, 8, 16)
    options = {"img_size": image, "window_size": window, "depths": depths, "embed_dim": dim, "num_heads": heads}
    theirs = randomized(timm.create_model("swin_tiny_patch4_window7_224", **options))
    ours = timm.create_model("swin_tiny_local", **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    report = load_checkpoint(ours, tmp_path / "timm.pth")
    assert (report.source, report.matched) == ("timm Swin", len(theirs.state_dict()))
    x = torch.randn(1, 3, *image, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    print(f"timm {image} window {window}: {(found - expected).abs().max():.1e} of {expected.abs().max():.1f}")
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_other_official_weights_give_the_official_output(case, size, tmp_path):
    source, shapes, logits, name, options = OTHERS[case]
    state = drawn(shapes)
    torch.save({"model": {}, "model_ema": state, "epoch": 262}, tmp_path / "official.pth")
    model = timm.create_model(name, num_classes=5, **options).double().eval()
    report = load_checkpoint(model, tmp_path / "official.pth")
    assert report == LoadReport(source, "ema", len(model.state_dict()), (), ())
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = logits(state, options["depths"], image), model(image)
    assert expected.std() > 0.1
    print(f"{case} {size}: largest difference {(found - expected).abs().max():.1e}")
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("case", PUBLISHED)
def test_other_published_sizes_convert_with_nothing_left_over(case):
    shapes, name, options = PUBLISHED[case]
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted = convert_state_dict(state, model).tensors
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in model.state_dict().items()}


@pytest.mark.parametrize("case", OTHERS)
def test_every_program_takes_official_weights(case, tmp_path):
    """Classification starts from and evaluates them, the dense tasks take all but the classifier and its norm."""
    _, shapes, _, name, options = OTHERS[case]
    state, path = drawn(shapes), str(tmp_path / "official.pth")
    torch.save({"model": state}, path)
    model = timm.create_model(name, num_classes=5, **options)
    assert load_weights(model, path, use_ema=True).weights == "raw"
    dense = TimmBackbone(name, pretrained=path, **options)
    dense.init_weights()
    own = model.state_dict()
    for key, tensor in dense.features.model.state_dict().items():
        assert torch.equal(tensor, own[key])
