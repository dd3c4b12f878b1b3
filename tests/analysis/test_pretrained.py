"""The command that measures pretrained ViTs."""

import argparse

import pytest
import torch

from elfatt.analysis import pretrained
from elfatt.analysis.__main__ import main
from elfatt.analysis.results import load_runs
from elfatt.conversion.handle import Call, handle_of

TINY = ["--models", "vit_tiny_patch16_224", "--repeats", "1", "--warm-up", "0"]


@pytest.fixture
def small(monkeypatch):
    """timm's smallest ViT, of two blocks."""
    create = pretrained.timm.create_model
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4}
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name, **given: create(name, **options, **given))


@pytest.mark.slow
def test_every_variant_is_measured_and_kept(tmp_path, capsys, small):
    path = tmp_path / "r.json"
    assert main(["pretrained", *TINY, "--sizes", "64", "48x96", "--results", str(path)]) == 0
    (run,) = load_runs(path)
    rows = {(row["height"], row["width"], row["variant"]): row for row in run["rows"]}
    assert set(rows) == {(*size, v) for size in ((64, 64), (48, 96)) for v in pretrained.VARIANTS}
    for size in ((64, 64), (48, 96)):
        macs = {variant: rows[*size, variant]["macs"] for variant in pretrained.VARIANTS}
        parts = {variant: rows[*size, variant]["attention_macs"] for variant in pretrained.VARIANTS}
        assert macs["no attention"] < macs["ELFATT"] < macs["unpatched"]
        products = parts["unpatched"] - parts["no attention"]
        assert products == 2 * 2 * (1 + size[0] * size[1] // 16) ** 2 * 32  # blocks, both products
        assert parts["ELFATT calibrated"] - parts["no attention"] <= 0.51 * products  # the class token's are exact
        assert all("images_per_s" in rows[*size, v] and "attention_ms" in rows[*size, v] for v in macs)
    assert "vit_tiny_patch16_224 at 48×96 | ELFATT calibrated |" in capsys.readouterr().out


def test_a_size_that_no_budget_fits_is_said(tmp_path, capsys, small):
    options = ["--sizes", "32", "--budget", "0.01", "--variants", "ELFATT calibrated"]
    assert main(["pretrained", *TINY, *options, "--results", str(tmp_path / "r.json")]) == 0
    assert "ELFATT calibrated is not timed: cost=0.01 cannot be reached" in capsys.readouterr().err


def test_models_that_pool_by_attention_are_counted():
    args = argparse.Namespace(block=2, batch_size=1, device="cpu", precision="float32")
    found = pretrained.count("vit_base_patch16_siglip_224", (32, 32), "unpatched", None, args)
    assert found["macs"] > found["attention_macs"] > 0


def test_no_attention_leaves_the_values():
    model = pretrained.build("vit_tiny_patch16_224", (32, 32), "cpu")
    layer = model.blocks[0].attn
    x = torch.randn(1, 5, 192)
    pretrained.convert(model, "no attention", None, 8)
    handle_of(model).enter(Call((2, 2), 1))
    with torch.no_grad():
        values = layer.qkv(x)[..., -192:]
        torch.testing.assert_close(layer(x), layer.proj(values))


def test_what_pays_is_beyond_the_quartiles():
    def row(size, variant, low, high):
        found = {"forward_ms": (low + high) / 2, "forward_ms_quartiles": [low, high]}
        return {"model": "m", "height": size, "width": size, "variant": variant, **found}

    rows = [row(size, "unpatched", 10, 11) for size in (1, 2, 3, 4)]
    rows += [row(1, "ELFATT", 8, 9), row(2, "ELFATT", 8, 10.5), row(3, "ELFATT", 8, 9), row(4, "ELFATT", 8, 9)]
    rows += [row(4, "ELFATT calibrated", 10, 11)]
    (line,) = pretrained.pays_from(rows)
    assert line == "m is faster with ELFATT from 3×3 on, ELFATT calibrated at none of these sizes."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "vit_tiny_patch16_22"], "did you mean 'vit_tiny_patch16_224'"),
        (["--budget", "0"], "--budget 0.0 must be a share above 0"),
        (["--models", "convnext_tiny", "--sizes", "64"], "ConvNeXt"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, capsys, options, message):
    assert main(["pretrained", *options, "--results", str(tmp_path / "r.json")]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
