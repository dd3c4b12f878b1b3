"""The demonstration of converted ViTs: costs, speeds, the report; its programs have tests of their own."""

import pytest
import timm
import torch

pytest.importorskip("matplotlib")

from elfatt.conversion import Head, LayerPlan, Plan  # noqa: E402
from elfatt.integrations.timm import vit_of  # noqa: E402
from scripts.pretrained import vit_digits  # noqa: E402
from scripts.pretrained.vit_digits import ALIGNED, BUDGETS, UNIFORM, Row  # noqa: E402


@pytest.fixture
def model():
    options = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    return timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=10, **options).eval()


def test_shares_are_of_the_attention_of_all_layers(model):
    name, tokens = vit_of(model).name, 64  # at 32²: a map of 8 × 8 and a class token
    blocks = Plan(name, {"blocks.0.attn": LayerPlan((Head("block", 4), Head()))})
    assert vit_digits.share(Plan(name), model, 32) == 1
    found = vit_digits.share(blocks, model, 32)
    assert found == pytest.approx(((16 + 1) + 3 * (tokens + 1)) / (4 * (tokens + 1)))


def test_every_variant_is_timed_at_every_side(model, monkeypatch):
    monkeypatch.setattr(vit_digits, "SIDES", (16, 32))
    monkeypatch.setattr(vit_digits, "TURNS", 1)
    plan = Plan(vit_of(model).name, {"blocks.0.attn": LayerPlan((Head("block", 2),) * 2)})
    before = model(torch.ones(1, 3, 16, 16))
    found = vit_digits.speeds(model, {"exact": None, "blocks": plan})
    assert set(found) == {16, 32} and all(set(times) == {"exact", "blocks"} for times in found.values())
    assert torch.equal(model(torch.ones(1, 3, 16, 16)), before)  # converted copies share the weights only


def test_the_report_says_what_was_reached(tmp_path, capsys):
    speed = dict.fromkeys(vit_digits.SIDES, 1.5)
    names = [UNIFORM, *(f"calibrated, {budget:.0%}" for budget in BUDGETS)]
    assert set(ALIGNED) <= set(names)
    rows = [Row(name, 0.4, 95.0, 97.5 if name in ALIGNED else None, speed) for name in names]
    vit_digits.write_report(tmp_path, 98.0, rows)
    text = (tmp_path / "report.md").read_text()
    assert text.count("1.50× | 1.50× | 1.50× |") == len(rows) and "| exact | 100% | 98.00 % |" in text
    assert "zero-shot: -3.00 points (goal: at most 1 lost: missed)" in text
    assert "aligned: -0.50 points (goal: at most 0.3 lost: missed)" in text
    rows = [Row(name, 0.4, 97.5, 97.8, speed) for name in names]
    vit_digits.write_report(tmp_path, 98.0, rows)
    assert (tmp_path / "report.md").read_text().count(": reached") == 2
    assert (tmp_path / "curves.png").stat().st_size > 0 and "report: " in capsys.readouterr().out
