"""From a trained ViT to a plan, and from a converted ViT back towards its teacher."""

import subprocess

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from classification import calibrate, distill, publish, train, validate
from classification.checkpoint import load
from classification.distill import Distiller
from elfatt.conversion import Plan
from elfatt.conversion.handle import Call, handle_of

SMALL = ["patch_size=4", "embed_dim=32", "depth=2", "num_heads=4", "reg_tokens=2"]
VIT = ["--model", "vit_tiny_patch16_224", "--model-kwargs", *SMALL]


@pytest.fixture
def teacher(options, tmp_path):
    """A trained ViT's checkpoint."""
    assert train.main(options(*VIT, "--epochs", 3, experiment="teacher")) == 0
    return tmp_path / "teacher" / "last.pth.tar"


def data(options, *extra):
    """The options that `train.py` shares with `validate.py`."""
    given = options(*VIT, *extra)
    kept = {"--data-dir", "--model", "--num-classes", "--img-size", "--batch-size", "--workers", "--device"}
    pairs = [given[at : at + 2] for at, item in enumerate(given) if item in kept]
    return [item for pair in pairs for item in pair] + ["--model-kwargs", *SMALL, "--no-amp", *map(str, extra)]


@pytest.fixture
def plan(options, teacher, tmp_path):
    path = tmp_path / "plan.json"
    argv = data(options, "--checkpoint", teacher, "--save-plan", path, "--images", 8, "--budget", 0.5)
    assert calibrate.main(argv) == 0
    return path


def test_a_plan_is_calibrated_evaluated_and_kept(options, teacher, plan, tmp_path, capsys):
    found = Plan.from_json(plan)
    assert set(found.layers) == {"blocks.0.attn", "blocks.1.attn"}
    again = tmp_path / "again.json"
    argv = data(options, "--checkpoint", teacher, "--save-plan", again, "--images", 8, "--budget", 0.5)
    assert calibrate.main(argv) == 0
    out = capsys.readouterr().out
    assert again.read_text() == plan.read_text() and "of attention's multiply-adds" in out
    exact, converted = (
        validate.run(data(options, "--checkpoint", teacher, *extra)) for extra in ([], ["--plan", plan])
    )
    assert exact["loss"] != converted["loss"] and exact["images"] == converted["images"]


def test_the_uniform_plan_needs_no_images(options, teacher, tmp_path, capsys):
    path = tmp_path / "uniform.json"
    argv = data(options, "--checkpoint", teacher, "--save-plan", path, "--uniform", "--block", 4)
    assert calibrate.main(argv) == 0
    heads = Plan.from_json(path).layers["blocks.0.attn"].heads
    assert [(head.branch, head.block) for head in heads] == [("linear", 0)] * 2 + [("block", 4)] * 2


def aligned(options, teacher, plan, *extra, **names):
    common = ("--initial-checkpoint", teacher, "--plan", plan, "--lr", 1e-3, "--model-ema", "--model-ema-decay", 0.5)
    return options(*VIT, *common, *extra, **names)


@pytest.mark.slow
def test_alignment_brings_the_student_closer_and_resumes_exactly(options, teacher, plan, tmp_path, monkeypatch):
    extra = ["--epochs", 4, "--batch-size", 4, "--recovery-interval", 2, "--scale", 1, 1]
    assert distill.main(aligned(options, teacher, plan, *extra, experiment="whole")) == 0
    assert (tmp_path / "whole" / "plan.json").read_text() == plan.read_text()

    class Stop(Exception):
        pass

    steps = []

    def stop(self, images, labels):
        steps.append(1)
        if len(steps) == 16:  # in the third epoch, the first that matches logits
            raise Stop
        return compute(self, images, labels)

    compute = Distiller.compute_loss
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Distiller, "compute_loss", stop)
        distill.main(aligned(options, teacher, plan, *extra, experiment="stopped"))
    assert distill.main(aligned(options, teacher, plan, *extra, "--resume", "auto", experiment="stopped")) == 0
    whole, stopped = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "stopped"))
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(value, stopped[key][name]) for name, value in whole[key].items())
    assert publish.main([str(tmp_path / "whole"), "--output", str(tmp_path / "published")]) == 0
    assert (tmp_path / "published" / "plan.json").read_text() == plan.read_text()
    first, *_, last = (line.split(",") for line in (tmp_path / "whole" / "summary.csv").read_text().splitlines()[1:])
    assert float(last[1]) < float(first[1])  # of another loss; both begin at the untrained student


def test_the_loss_is_that_of_attention_then_of_logits(options, teacher, plan):
    args = distill.parse_args(aligned(options, teacher, plan, "--epochs", 4), train=True)
    run = Distiller(args)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in run.model.train().parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    first = run.compute_loss(images, None)
    exact = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, reg_tokens=2, num_classes=3
    ).eval()
    exact.load_state_dict(run.teacher.state_dict())
    squares = []
    for ours, theirs in zip(run.model.blocks, exact.blocks, strict=True):
        seen = []
        handle = theirs.attn.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        with torch.no_grad():
            exact(images)
            ((x, target),) = seen
            handle_of(run.model).enter(Call((8, 8), 3))
            squares.append(((ours.attn(x) - target).norm() / target.norm()) ** 2)
        handle.remove()
    assert first.item() == pytest.approx((sum(squares) / 2).item(), rel=1e-4) and first > 0
    first.backward()
    trained = {name for name, p in run.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all(".attn." in name for name in trained)  # each layer by itself
    run.state.epoch = 2
    with torch.no_grad():
        teacher_p, student_log = exact(images).softmax(-1), run.model(images).log_softmax(-1)
    wanted = (teacher_p * (teacher_p.log() - student_log)).sum(-1).mean()
    assert run.compute_loss(images, None).item() == pytest.approx(wanted.item(), rel=1e-3)


def test_a_lepe_begins_at_zero_and_is_trained(options, teacher, tmp_path, capsys):
    path, common = tmp_path / "lepe.json", ("--checkpoint", teacher)
    assert calibrate.main(data(options, *common, "--save-plan", path, "--uniform", "--block", 4, "--lepe")) == 0
    assert Plan.from_json(path).lepe
    assert distill.main(aligned(options, teacher, path, "--epochs", 2, experiment="lepe")) == 0
    state = load(tmp_path / "lepe" / "last.pth.tar")["state_dict"]
    added = set(state) - set(load(teacher)["state_dict"])
    assert added == {f"blocks.{block}.attn.lepe.{name}" for block in (0, 1) for name in ("weight", "bias")}
    assert all(state[name].any() for name in added)
    found = data(options, "--checkpoint", tmp_path / "lepe" / "last.pth.tar", "--plan", path)
    assert validate.run(found)["images"] == 15
    assert publish.main([str(tmp_path / "lepe"), "--output", str(tmp_path / "out")]) == 1
    assert "was trained with LePE" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_align_in_both_halves(options, teacher, plan, tmp_path, command):
    argv = aligned(options, teacher, plan, "--epochs", 2, "--batch-size", 4, experiment="two")
    run = command("scripts/torchrun.sh", "classification.distill", *argv, NGPUS="2")
    assert subprocess.run(**run, capture_output=True).returncode == 0
    assert load(tmp_path / "two" / "last.pth.tar")["position"]["updates"] == 6


def test_mistakes_end_in_one_line(options, teacher, plan, tmp_path, capsys):
    def error(program, argv):
        assert program.main([str(item) for item in argv]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "pass --plan FILE" in error(distill, options(*VIT))
    text = error(train, options("--plan", plan, experiment="swin"))
    assert "plan.json does not fit cswin_nano_elfatt: the plan was made for VisionTransformer-32-2" in text
    assert "missing.json cannot be read" in error(train, options(*VIT, "--plan", tmp_path / "missing.json"))
    argv = data(options, "--checkpoint", teacher, "--save-plan", tmp_path / "p.json", "--budget", 0)
    assert "cost=0.0 (the budget) must be in (0, 1]" in error(calibrate, argv)
