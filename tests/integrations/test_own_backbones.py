"""Vanilla layers of the package's own models are converted in place and come back without a trace."""

from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config

import elfatt
from elfatt.analysis.complexity import measure_complexity
from elfatt.conversion import Head, LayerPlan, Plan
from elfatt.integrations import timm as adapter
from elfatt.integrations.mm_models import build_model, load_model

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "segmentation" / "scenes_nano.py"
MODELS = {
    "CSWin": lambda: timm.create_model("cswin_nano_elfatt", num_classes=5),
    "Swin, all vanilla": lambda: timm.create_model("swin_nano_elfatt", num_classes=5, levels="VVVV"),
    "without LePE": lambda: timm.create_model("cswin_nano_elfatt", num_classes=5, lepe=False),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for name, parameter in model.named_parameters():  # peaked softmaxes, which another branch changes
        if name.endswith("qkv.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(model, size=(72, 104)):
    with torch.no_grad():
        return model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)))


def plan_of(model, *heads):
    found = adapter.vit_of(model)
    return Plan(found.name, {name: LayerPlan((heads * count)[:count]) for name, count in found.heads.items()})


def test_one_block_is_exact_and_removal_leaves_no_trace(model):
    before, keys = run(model), list(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with elfatt.convert(model, plan_of(model, Head("block", 999))):
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-5)
        elfatt.convert(model, block=2)  # replaces the first
        assert (run(model) - before).abs().max() > 1e-4
    elfatt.convert(model, plan_of(model, Head())).remove()
    assert torch.equal(run(model), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_linear_heads_are_those_of_effatt():
    torch.manual_seed(0)
    vanilla = timm.create_model("cswin_nano_elfatt", num_classes=5, levels="VVVV").eval()
    linear = timm.create_model("cswin_nano_elfatt", num_classes=5, levels="EEEE", attention="effatt").eval()
    linear.load_state_dict(vanilla.state_dict())
    elfatt.convert(vanilla, plan_of(vanilla, Head("linear")))
    torch.testing.assert_close(run(vanilla), run(linear), rtol=1e-4, atol=1e-5)


def test_calibrated_plans_are_cheaper_and_closer_than_the_uniform_one(model):
    images = torch.randn(2, 3, 72, 104, generator=torch.Generator().manual_seed(1))
    before = run(model)
    calibration = adapter.calibrate(model, images)
    errors = []
    for plan in (calibration.plan(cost=0.6), None):
        with elfatt.convert(model, plan, block=2):
            errors.append((run(model) - before).norm())
    assert errors[0] < errors[1]


def test_a_converted_model_is_linear_in_the_pixels():
    model = timm.create_model("cswin_nano_elfatt", num_classes=5)
    elfatt.convert(model, block=7)
    model = model.to("meta")
    costs = [measure_complexity(model, (side, side)).macs_true for side in (448, 896)]
    assert costs[1] / costs[0] == pytest.approx(4, rel=0.02)


def test_the_backbone_of_a_segmentor():
    torch.manual_seed(0)
    model = load_model(CONFIG, "cpu")
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(image, None, mode="tensor")
        with elfatt.convert(model, block=2):
            assert not torch.equal(model(image, None, mode="tensor"), before)
        assert torch.equal(model(image, None, mode="tensor"), before)


def test_a_plan_of_the_classifier_fits_the_backbone_of_a_config(tmp_path):
    classifier = timm.create_model("cswin_nano_elfatt", block_size=4)
    plan_of(classifier, Head("linear")).to_json(tmp_path / "plan.json")
    config = Config.fromfile(CONFIG)
    exact = build_model(config, "cpu")
    config.model.backbone.plan = str(tmp_path / "plan.json")
    model = build_model(config, "cpu")
    model.load_state_dict(exact.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = exact(image, None, mode="tensor")
        assert not torch.equal(model(image, None, mode="tensor"), expected)
        elfatt.convert(exact, plan_of(classifier, Head("linear")))
        assert torch.equal(model(image, None, mode="tensor"), exact(image, None, mode="tensor"))


def test_what_cannot_be_converted_is_named():
    with pytest.raises(TypeError, match="CSWinTransformer has no vanilla attention that can be converted"):
        elfatt.convert(timm.create_model("cswin_nano_elfatt", levels="EEEE"))
    model = timm.create_model("cswin_nano_elfatt")
    plan = Plan(adapter.vit_of(model).name, plan_of(model, Head("linear")).layers, lepe=True)
    with pytest.raises(ValueError, match="has its own LePE: use a plan without it"):
        elfatt.convert(model, plan)
