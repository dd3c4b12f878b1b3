"""The benchmark of diffusion models, on tiny ones: counts by formulas written out, rows, pictures, refusals."""

import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from elfatt.analysis import diffusion, diffusion_models, diffusion_quality  # noqa: E402
from elfatt.analysis.__main__ import main  # noqa: E402
from elfatt.analysis.diffusion_models import Config, Meter, Source, Step, share_weights, total  # noqa: E402
from elfatt.analysis.results import load_runs  # noqa: E402
from elfatt.conversion import Plan  # noqa: E402
from elfatt.integrations import diffusers as adapter  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FAST = ["diffusion", "--device", "cpu", "--config", "tiny", "--repeats", "2", "--warm-up", "0"]
FAST += ["--sizes", "64", "--min-tokens", "16", "--block", "2"]


@pytest.fixture(autouse=True)
def one_thread():
    """In models as small as these threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(path):
    (run,) = load_runs(path)
    return run["rows"]


def measure(path, *options):
    assert main([*FAST, *options, "--results", str(path)]) == 0
    return rows_of(path)


@pytest.mark.parametrize(
    ("name", "side", "millions"),
    [("sd15", 512, 859.521), ("sdxl", 1024, 2567.464), ("pixart-alpha", 512, 610.856), ("pixart-sigma", 1024, 610.856)],
)
def test_the_configurations_are_the_published_ones(name, side, millions):
    model = Source(name, (side, side), torch.float32).build("meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart-alpha", "pixart-sigma"])
def test_a_step_of_every_configuration_runs(name):
    source = Source(name, (1024, 1024), torch.float16)
    tokens = {"sd15": [16384, 4096, 1024, 256], "sdxl": [4096, 1024]}.get(name, [4096])
    kinds = source.kinds()  # runs it on the meta device
    assert [height * width for (height, width), _, _ in kinds] == tokens
    assert sum(map(len, kinds.values())) == {"sd15": 16, "sdxl": 70}.get(name, 28)


def expected_macs(variant, n, channels, heads, block):
    """Of one self-attention layer and picture: projections, matching, and attention over what is left of N tokens."""
    width = channels // heads

    def projections(n):
        return 4 * n * channels**2

    def matching(stride):
        ends = n // stride**2
        return ends * (n - ends) * channels

    def elfatt(n, keys):
        return heads // 2 * (2 * n * width**2 + 2 * n * keys * width)

    half, less, agents = n - int(0.5 * n), n - int(0.4 * n), n // 16
    return {
        "unpatched": projections(n) + 2 * n * n * channels,
        "ELFATT": projections(n) + elfatt(n, block**2),
        "no attention": projections(n),
        "ToMe 0.5": projections(half) + matching(2) + 2 * half * half * channels,
        "ELFATT + ToMe 0.5": projections(half) + matching(2) + elfatt(half, half),
        "Agent": 0.4 * (projections(less) + matching(4) + 4 * less * agents * channels)
        + 0.6 * (projections(less) + matching(2) + 2 * less * less * channels),
    }[variant]


@pytest.mark.parametrize("variant", [name for name in diffusion.VARIANTS if name != "ELFATT calibrated"])
def test_multiply_adds_are_those_of_the_formulas(variant, tmp_path):
    if "ToMe" in variant:
        pytest.importorskip("tomesd")
    rows = measure(tmp_path / "r.json", "--layers", "--variants", variant, "--repeats", "1", "--batch-size", "3")
    large, small = [row for row in rows if row["variant"] == variant]
    assert (large["part"], large["count"]) == ("64 tokens, 16 channels, 4 heads", 3)
    assert (small["part"], small["count"]) == ("16 tokens, 32 channels, 4 heads", 4)
    assert large["attention_macs"] == pytest.approx(3 * expected_macs(variant, 64, 16, 4, 2))
    alone = {
        "ToMe 0.5": "unpatched",
        "Agent": "unpatched",
        "ELFATT + ToMe 0.5": "ELFATT",
    }  # smaller maps are not merged
    assert small["attention_macs"] == pytest.approx(3 * expected_macs(alone.get(variant, variant), 16, 32, 4, 2))


def test_every_variant_of_a_step_is_measured(tmp_path, capsys):
    pytest.importorskip("tomesd")
    path = tmp_path / "r.json"
    rows = measure(path, "--cost", "0.4")
    assert [row["variant"] for row in rows] == list(diffusion.VARIANTS) and not any("refused" in row for row in rows)
    base, uniform, calibrated = rows[:3]
    layers = 3 * expected_macs("unpatched", 64, 16, 4, 2) + 4 * expected_macs("unpatched", 16, 32, 4, 2)
    assert base["attention_macs"] == pytest.approx(2 * layers)  # guidance: two latents a picture
    for row in rows:
        assert row["step_speedup"] == pytest.approx(base["step_ms"] / row["step_ms"])
        assert row["attention_speedup"] == pytest.approx(base["attention_ms"] / row["attention_ms"])
        assert 0 < row["attention_ms"] < row["step_ms"] and row["counted_memory_mib"] > 0
        assert base["macs"] - row["macs"] == pytest.approx(base["attention_macs"] - row["attention_macs"])
    spent = 3 * 2 * 64 * 64 * 16 + 4 * 2 * 16 * 16 * 32  # of exact attention, without projections
    assert base["attention_macs"] - calibrated["attention_macs"] >= 2 * 0.6 * spent
    assert capsys.readouterr().out.count("| tiny at 64×64 | step |") == len(rows)
    (run,) = load_runs(path)
    assert run["kind"] == "diffusion" and run["settings"]["plan"] == "calibrated" and run["settings"]["cost"] == 0.4


def test_variants_that_a_model_does_not_know_are_left_out(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tomesd")
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16}
    small = Config("PixArtTransformer2DModel", {**small, "caption_channels": 8, "use_additional_conditions": False}, 5)
    monkeypatch.setitem(diffusion_models.CONFIGS, "tiny", small)
    rows = measure(tmp_path / "r.json", "--variants", "ELFATT", "ToMe 0.5", "Agent")
    assert [row.get("refused", "")[:41] for row in rows] == [
        *["", ""],
        *["tokens of PixArtTransformer2DModel cannot"] * 2,
    ]
    assert capsys.readouterr().err.count("is not timed: tokens of PixArtTransformer2DModel cannot be merged") == 2


def test_what_memory_does_not_hold_is_skipped_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diffusion, "available_bytes", lambda device: 2**20)
    rows = measure(tmp_path / "r.json", "--variants", "unpatched", "ELFATT")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert line.startswith("skipped: it needs about 0.0 GiB, 0.0 GiB are free")
    assert [row["refused"] for row in rows] == [line, line]


def test_copies_share_weights_and_nothing_else():
    model = Source("tiny", (64, 64), torch.float32).build("cpu")
    other = share_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not set(model.modules()) & set(other.modules())
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad(), adapter.apply(other, block=2, min_tokens=0):
        assert not torch.equal(Step(model)(x), Step(other)(x))


def test_a_meter_sums_what_passes_inside_layers():
    clock, inner = iter([1.0, 3.0, 10.0, 14.0]), torch.nn.Identity()
    meter = Meter([inner], lambda: next(clock))
    inner(inner(torch.zeros(1)))
    assert total(meter.take()) == 2 + 4 and meter.take() == []


def test_the_guide_works(monkeypatch):
    pytest.importorskip("tomesd")
    guide = (ROOT / "docs" / "diffusion.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    names = {}
    exec(example, names)
    assert names["plan"].model == "UNet2DConditionModel-224-6"
    outputs = [names[name] for name in ("before", "uniform", "calibrated", "merged", "agent")]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    understood = []
    monkeypatch.setattr(diffusion, "run", understood.append)
    for command in re.findall(r"^python -m elfatt.analysis diffusion(.*)$", guide, re.M):
        assert main(["diffusion", *shlex.split(command, comments=True)]) == 0
    assert [args.layers for args in understood] == [False, False, True, False]
    options = set(re.findall(r"--[a-z][a-z-]+", guide))
    text = subprocess.run(
        [sys.executable, "-m", "elfatt.analysis", "diffusion", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(option in text for option in options)


# pictures


class Pipeline:
    """Stands in for Stable Diffusion, whose text encoder needs transformers: three steps, latents as pixels."""

    def __init__(self, folder):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(Path(folder) / "unet").eval()
        self.scheduler = diffusers.DDIMScheduler()

    def to(self, device):
        return self

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, prompt, height, width, num_inference_steps, generator):
        x = torch.randn(1, 4, height // 8, width // 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        text = torch.full((2, 5, 8), float(len(prompt)))
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                noise = self.unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=text).sample[:1]
            x = self.scheduler.step(noise, t, x).prev_sample
        pixels = (x[0, :3].movedim(0, -1).clamp(-2, 2) * 60 + 128).to(torch.uint8)
        return types.SimpleNamespace(images=[Image.fromarray(pixels.numpy())])


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    torch.manual_seed(0)
    Source("tiny", (64, 64), torch.float32).build("cpu").save_pretrained(tmp_path / "own" / "unet")
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", staticmethod(lambda folder, **options: Pipeline(folder))
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na bird\n")
    return ["--model", str(tmp_path / "own"), "--prompts", str(prompts), "--grid", str(tmp_path / "grid.png")]


def test_pictures_have_the_same_seeds_and_their_distance(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diffusion_quality, "METRICS", {"PSNR": diffusion_quality.METRICS["PSNR"]})
    options = [*pipeline, "--steps", "3", "--variants", "ELFATT", "ELFATT calibrated"]
    rows = measure(tmp_path / "r.json", *options)
    pictures, steps = ([row for row in rows if (row["part"] == "pictures") == wanted] for wanted in (True, False))
    assert [row["variant"] for row in pictures] == [row["variant"] for row in steps]
    assert all(row["model"] == "own" for row in rows)
    assert "psnr_db" not in pictures[0] and all(5 < row["psnr_db"] < 99 for row in pictures[1:])
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (2 * 256 + 20, 3 * 256, 3)
    plan = Plan.from_json(tmp_path / "grid.json")
    assert plan.layers and "calibrated plan:" in capsys.readouterr().err
    rows = measure(tmp_path / "s.json", *options[:-2], "ELFATT", "--min-tokens", "65")  # nothing is replaced
    assert next(row for row in rows if row["variant"] == "ELFATT")["psnr_db"] == 100


def test_psnr():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[0] += 10
    assert diffusion_quality.psnr(a, b) == pytest.approx((20 * np.log10(255 / 10) + 100) / 2)


def test_other_measures_are_asked_as_their_packages_want(monkeypatch):
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = 255 - pictures

    class LPIPS:
        def __init__(self, net, verbose):
            assert net == "alex"

        def __call__(self, x, y):
            assert x.shape == (1, 3, 8, 8) and x.min() >= -1 and x.max() <= 1
            return (x - y).abs().mean()[None, None, None, None]

    class FID:
        def __init__(self):
            self.seen = {}

        def update(self, images, real):
            assert images.dtype == torch.uint8
            self.seen[real] = images

        def compute(self):
            assert torch.equal(self.seen[True], other) and torch.equal(self.seen[False], pictures)
            return torch.tensor(7.0)

    for name, content in {
        "lpips": {"LPIPS": LPIPS},
        "torchmetrics.image.fid": {"FrechetInceptionDistance": FID},
    }.items():
        for parent in [name.rsplit(".", n)[0] for n in range(name.count("."), 0, -1)]:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    found = {
        name: diffusion_quality.METRICS[name].measure(pictures, other, ["a", "b"], "") for name in ("LPIPS", "FID")
    }
    apart = (pictures.float() - other.float()).abs().mean().item() / 127.5
    assert found == {"LPIPS": pytest.approx(apart, rel=1e-5), "FID": 7}


def test_the_clip_score_of_a_model_on_disk(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    pictures = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8)
    prompts = ["a", "b c", "d" * 100]  # the last one is too long for the model
    found = diffusion_quality.METRICS["CLIP score"].measure(pictures, pictures, prompts, str(tmp_path))
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        inputs = processor(text=prompt, images=picture, return_tensors="pt", truncation=True)
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)[0]
            read = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)[0]
        scores.append(100 * max(0, (seen @ read / seen.norm() / read.norm()).item()))
    assert found == pytest.approx(sum(scores) / 3, rel=1e-4) and found > 0


def test_missing_packages_are_named(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diffusion_quality.importlib.util, "find_spec", lambda name: None if "t" in name else name)
    monkeypatch.setattr(diffusion_quality, "METRICS", {**diffusion_quality.METRICS})
    del diffusion_quality.METRICS["LPIPS"]
    measure(tmp_path / "r.json", *pipeline, "--steps", "1", "--variants", "unpatched")
    error = capsys.readouterr().err
    assert "CLIP score is skipped: pip install transformers\n" in error
    assert "FID is skipped: pip install torchmetrics torch-fidelity\n" in error and "PSNR is" not in error


def test_a_measure_that_fails_costs_nothing_else(pipeline, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no weights")

    broken = diffusion_quality.Metric("fid", (), fail)
    monkeypatch.setattr(diffusion_quality, "METRICS", {"FID": broken, "PSNR": diffusion_quality.METRICS["PSNR"]})
    rows = measure(tmp_path / "r.json", *pipeline, "--steps", "1", "--variants", "ELFATT")
    assert rows[1]["part"] == "pictures" and rows[1]["psnr_db"] > 0 and not any("fid" in row for row in rows)
    assert "FID is skipped: no weights\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "{folder}/p.txt"], "p.txt needs the weights of --model PATH"),
        (["--model", "{folder}"], "has no unet/config.json or transformer/config.json: pass a pipeline saved by"),
        (["--model", "{folder}/own", "--prompts", "{folder}/empty.txt"], "empty.txt contains no prompts: write one"),
        (["--model", "{folder}/own", "--prompts", "{folder}/none.txt"], "No such file or directory"),
        (["--model", "{folder}/joint"], "contains an unsupported SD3Transformer2DModel: use UNet2DConditionModel"),
        (["--plan", "{folder}/empty.txt"], "empty.txt is not a plan"),
        (["--cost", "0"], "--cost 0.0 must be a share above 0 and at most 1"),
        (["--block", "0"], "--block must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--grid", "g.jpg"], "--grid g.jpg must end in .png"),
        (["--sizes", "big"], "size 'big' must be a side or HEIGHTxWIDTH"),
    ],
)
def test_bad_input_stops_in_one_line(options, message, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    for name, kind in (("own", "UNet2DConditionModel"), ("joint", "SD3Transformer2DModel")):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer" / "config.json").write_text(json.dumps({"_class_name": kind}))
    options = [text.format(folder=tmp_path) for text in options]
    assert main([*FAST, *options, "--results", str(tmp_path / "r.json")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert message in line and not (tmp_path / "r.json").exists()
