"""The comparison on digits: its measures against closed forms, its pairs, and a small run from start to report."""

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("tomesd")

from scripts.diffusion import compare, generators, outcome, quality  # noqa: E402


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def tiny_unet():
    return generators.UNet2DConditionModel(
        sample_size=32,
        in_channels=3,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        num_class_embeds=10,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_dit():
    """64 tokens."""
    return generators.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=10,
    )


def test_feature_distance_is_relative():
    wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert quality.feature_distance(wanted * torch.tensor([[1.5], [1.0]]), wanted) == pytest.approx(0.25)


def test_frechet_distance_of_normal_samples_is_the_closed_form():
    first = torch.randn(500, 3, dtype=torch.float64)
    first = (first - first.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(first.T.cov())).T  # mean 0, covariance 1
    assert quality.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert quality.frechet_distance(first + 2, first) == pytest.approx(3 * 2**2)
    scale, shift = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 0.0])  # (σ - 1)² along each axis
    assert quality.frechet_distance(first[:400] * 0 + shift, first * 1e-6) == pytest.approx(1, rel=1e-3)
    assert quality.frechet_distance(first * scale + shift, first) == pytest.approx(1 + 0 + 1 + 16)


def test_frechet_distance_where_covariances_do_not_commute():
    first, second = torch.randn(300, 3, dtype=torch.float64), torch.randn(200, 3, dtype=torch.float64)
    first, second = first @ torch.randn(3, 3).double(), second @ torch.randn(3, 3).double()
    c1, c2 = first.T.cov(), second.T.cov()
    root = torch.linalg.eigvals(c1 @ c2).real.clamp_min(0).sqrt().sum()
    wanted = (first.mean(0) - second.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert quality.frechet_distance(first, second) == pytest.approx(wanted.item(), rel=1e-6)


def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(generators, "SAVE_EVERY", 1)
    images, labels = torch.rand(12, 1, 8, 8) * 2 - 1, torch.arange(12) % 10

    def train(path, stop=None):
        torch.manual_seed(0)
        model = tiny_unet()
        if stop is not None:
            steps = iter(range(stop))
            monkeypatch.setattr(generators, "save", lambda *args: (whole(*args), next(steps)))
            with pytest.raises(StopIteration):
                generators.train(model, images, labels, path, ((4, 2, 2), (8, 3, 2)))
            monkeypatch.setattr(generators, "save", whole)
            return None
        return generators.train(model, images, labels, path, ((4, 2, 2), (8, 3, 2)))

    whole = generators.save
    train(tmp_path / "killed.pt", stop=2)
    resumed, straight = train(tmp_path / "killed.pt"), train(tmp_path / "straight.pt")
    assert torch.load(tmp_path / "killed.pt")["steps"] == 4
    for found, wanted in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    return compare.Subject("tiny", tiny_dit().eval(), steps=2)


VARIANTS = {
    "unpatched": compare.Variant("unpatched", None),
    "exact": compare.Variant("ELFATT, uniform", lambda subject: {"plan": subject.exact()}),
    "half": compare.Variant(
        "ELFATT, calibrated", lambda subject: {"plan": subject.plan(1.0, shortcut=True), "min_tokens": 0}
    ),
    "linear": compare.Variant("linear alone", lambda subject: {"min_tokens": 0, "block": 2}),
}


def test_samples_are_pairs_and_survive_a_kill(subject, tmp_path):
    path = tmp_path / "samples.pt"
    first = compare.draw_samples(subject, {"unpatched": VARIANTS["unpatched"]}, path, pictures=6, batch=4)
    found = compare.draw_samples(subject, VARIANTS, path, pictures=6, batch=4)
    assert torch.equal(found["unpatched"][0], first["unpatched"][0]) and found["unpatched"][1] == first["unpatched"][1]
    assert torch.equal(found["exact"][0], found["unpatched"][0])  # the same noise
    assert not torch.equal(found["linear"][0], found["unpatched"][0])
    assert len(found["linear"][0]) == 6 and len(found["linear"][1]) == 2


def test_shares_of_attention_are_those_of_the_formula(subject):
    shares = compare.attention_share(subject, VARIANTS)
    linear, block = 2 * 64 * 4 * 4, 2 * 64 * 4 * 4  # one head of width 4, 64 tokens; blocks of 2 × 2
    assert shares["unpatched"] == shares["exact"] == 1
    assert shares["linear"] == pytest.approx((linear + block) / (2 * 2 * 64 * 64 * 4))


def row(name, family, share, psnr, accuracy):
    return outcome.Result(name, family, share, psnr, 0.1, accuracy, 1.0, 0.1, 2.0)


ROWS = [
    row("unpatched", "unpatched", 1.0, outcome.MAX_PSNR, 90.0),
    row("ELFATT, uniform", "ELFATT, uniform", 0.05, 12.0, 60.0),
    row("a", "ELFATT, calibrated", 0.45, 25.0, 89.5),
    row("b", "ELFATT, calibrated + V", 0.25, 20.0, 88.0),
    row("ToMe 0.5", "ToMe", 0.3, 18.0, 80.0),
]


def test_conclusions_compare_at_no_more_cost():
    text = outcome.conclusions(ROWS, {})
    assert "uniform split, at 5.0% of the multiply-adds: accuracy 60.0 % after 90.0 % (-30.0 points)" in text
    assert "over the uniform split +29.5 points and +13.0 dB" in text
    assert "at no more cost b (25.0%) is closer: 20.0 dB and 88.0 %" in text
    assert "at 50%: reached." in text and text.endswith("closer than each rival at no more cost: reached.")
    assert "train longer" not in text
    assert "has only 20.0 %: train longer" in outcome.conclusions([row("unpatched", "", 1, 100, 20.0), *ROWS[1:]], {})
    assert outcome.conclusions([*ROWS, row("Agent", "Agent", 0.3, 21.0, 90.0)], {}).endswith("missed.")
    weaker = outcome.conclusions([r if r.name != "a" else row("a", r.family, 0.45, 25.0, 88.9) for r in ROWS], {})
    assert "at 50%: missed." in weaker
    alone = outcome.conclusions([r for r in ROWS if r.family not in ("ToMe", "Agent")], {})
    assert alone.endswith("closer than each rival at no more cost: no rival to compare with.")


def test_report_has_every_row_and_its_pictures(tmp_path):
    grids = {"UNet": {r.name: torch.rand(10, 1, 32, 32) for r in ROWS}}
    outcome.write_report(
        tmp_path,
        {"UNet": ROWS},
        grids,
        {"UNet": {"Agent": "no"}},
        classifier_accuracy=98.0,
        pictures=20,
        steps=4,
    )
    text = (tmp_path / "report.md").read_text()
    assert "| ToMe 0.5 | 30.0% | 18.0 dB | 0.100 | 80.0 % | 1.00 | 0.100 | 2.00× |" in text
    assert "- Left out, Agent: no." in text
    for name in ("grid.png", "curves.png"):
        assert name in text and Image.open(tmp_path / name).size[0] > 500


@pytest.mark.slow
def test_from_training_to_report_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "MODELS", {"UNet": tiny_unet, "DiT": tiny_dit})
    for name, value in {
        "PHASES": dict.fromkeys(("UNet", "DiT"), ((16, 2, 1), (32, 2, 1))),
        "PICTURES": 2,
        "BATCH": 2,
        "STEPS": 2,
    }.items():
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(compare, "CALIBRATION_PICTURES", 1)
    kept = ("unpatched", "ELFATT, uniform", "ELFATT, calibrated, 50%", "ToMe 0.5", "Agent")
    monkeypatch.setattr(compare, "VARIANTS", {name: compare.VARIANTS[name] for name in kept})
    images, labels = compare.load_digits()
    few = {split: x[:10] for split, x in images.items()}, {split: x[:10] for split, x in labels.items()}
    monkeypatch.setattr(compare, "load_digits", lambda: few)
    compare.main([str(tmp_path)])
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert {path.name for path in trained} == {"UNet.pt", "DiT.pt", "classifier.pt"}
    report = (tmp_path / "report.md").read_text()
    for name in kept:
        assert report.count(f"| {name} |") == 2 - (name.startswith(("ToMe", "Agent")))  # not for the DiT
    assert "Left out, ToMe 0.5, Agent: tokens of DiTTransformer2DModel cannot be merged" in report
    compare.main([str(tmp_path)])
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
