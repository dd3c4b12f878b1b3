"""What a message of the programs advises works."""

import re
import shutil

import pytest
import torch

from classification import validate
from classification.checkpoint import load
from classification.train import Trainer, main
from tests.classification.test_distributed import run_two


def fails_once(monkeypatch, rank=0):
    """The loss of the second batch of one process is NaN, unless the gradient is clipped or the run in bfloat16."""
    compute = Trainer.compute_loss

    def compute_loss(self, images, labels):
        loss = compute(self, images, labels)
        helped = self.args.clip_grad or (self.args.amp and self.args.amp_dtype == "bfloat16")
        return loss * torch.nan if self.state.batch == 1 and self.world.rank == rank and not helped else loss

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("amp", [["--amp", "--amp-dtype", "float16"], []], ids=["float16", "float32"])
def test_a_run_with_a_non_finite_loss_goes_on_as_advised(options, tmp_path, fails, monkeypatch, amp):
    fails_once(monkeypatch)
    argv = options(*amp, "--epochs", 1, "--grad-accum-steps", 2, "--batch-size", 4, "--model-ema")
    line = fails(main, argv)
    assert "the loss is nan at epoch 0, batch 1, update 0" in line
    resume, advised = re.search(r"pass (--resume \S+) with (.*), or start a new run", line).groups()
    assert advised.split(" or ") == (["--amp-dtype bfloat16"] if amp else []) + ["--clip-grad 1"]
    for number, remedy in enumerate(advised.split(" or ")):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"run{number}")
        resumed = [*argv, *resume.replace("/run/", f"/run{number}/").split(), *remedy.split()]
        assert main([*resumed, "--experiment", f"run{number}"]) == 0
        assert load(folder / "last.pth.tar")["position"]["updates"] == 3
    assert main([*argv, "--experiment", "new", "--lr", "1e-4", "--clip-grad", "1"]) == 0


def test_weights_that_are_not_finite_are_not_resumed(options, fails, monkeypatch):
    compute = Trainer.compute_loss

    def compute_loss(self, images, labels):
        torch.nn.init.constant_(next(iter(self.model.parameters())), torch.inf)
        return compute(self, images, labels)

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    line = fails(main, options("--epochs", 1))
    assert line.endswith(": start a new run (--experiment) with a lower --lr") and "--resume" not in line


@pytest.mark.slow
def test_two_processes_go_on_as_advised(options, tmp_path, monkeypatch, capfd):
    fails_once(monkeypatch, rank=1)
    argv = options("--epochs", 1, "--batch-size", 4)
    assert run_two(argv, monkeypatch) == [1, 1]
    error = capfd.readouterr().err
    assert "the loss of another process is not finite at epoch 0, batch 1" in error and "Traceback" not in error
    assert (tmp_path / "run" / "nan-batch-rank1.pth.tar").exists()
    resume = re.search(r"--resume \S+ with --clip-grad 1", error)[0].replace("with ", "").split()
    assert run_two([*argv, *resume], monkeypatch) == [0, 0]
    assert load(tmp_path / "run" / "last.pth.tar")["position"]["updates"] == 3


@pytest.fixture
def built(monkeypatch):
    """Runs are built, not trained."""
    monkeypatch.setattr(Trainer, "fit", lambda self: None)


@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        (["--num-classes", 5], "build a model with --num-classes 3", ["--num-classes", 3]),
        (["--num-classes", 5], "list the classes with --class-map", ["--num-classes", 5, "--class-map", "MAP"]),
        (["--batch-size", 64], "lower --batch-size", ["--batch-size", 24]),
        (["--mixup", 0.8, "--batch-size", 7], "--batch-size must be even", ["--mixup", 0.8, "--batch-size", 6]),
        (["--warmup-epochs", 2], "must be below --epochs 2, got 2: pass a lower one", ["--warmup-epochs", 1]),
        (["--val-split", "nope"], "correct --data-dir or --val-split", ["--val-split", "val"]),
        (["--variant", "own"], "needs a --config that defines it", ["--variant", "own", "--config", "YAML"]),
        (["--config", "YAML"], "needs --variant, one of own", ["--config", "YAML", "--variant", "own"]),
        (["--output", "MAP"], "choose another --output", ["--output", "OUT"]),
    ],
    ids=lambda value: None if isinstance(value, list) else value,
)
def test_options(options, tmp_path, fails, built, wrong, message, right):
    (tmp_path / "map.txt").write_text("\n".join(["cat", "dog", "fish", "horse", "owl"]))
    (tmp_path / "own.yaml").write_text("variants:\n  own: {lr: 1e-4}\n")
    places = {"MAP": tmp_path / "map.txt", "YAML": tmp_path / "own.yaml", "OUT": tmp_path / "out"}
    wrong, right = ([places.get(item, item) for item in given] for given in (wrong, right))
    assert message in fails(main, options(*wrong))
    assert main(options(*right, experiment="right")) == 0


class TestResume:
    @pytest.fixture
    def run(self, options, tmp_path):
        assert main(options("--epochs", 1, "--batch-size", 24, "--model-ema")) == 0
        return tmp_path / "run"

    def test_a_folder_with_a_run(self, options, run, fails, built):
        argv = ["--epochs", 1, "--batch-size", 24, "--model-ema"]
        assert "--resume auto, or pass another --experiment" in fails(main, options(*argv))
        assert main(options(*argv, "--resume", "auto")) == main(options(*argv, experiment="other")) == 0

    def test_another_learning_rate(self, options, run, fails, built):
        argv = ["--epochs", 1, "--batch-size", 24, "--model-ema", "--lr", 1]
        line = fails(main, options(*argv, "--resume", "auto"))
        assert "resume with its args.yaml, or start a new run from its weights with --initial-checkpoint" in line
        assert main(["--config", str(run / "args.yaml"), "--resume", "auto"]) == 0
        assert main(options(*argv, "--initial-checkpoint", run / "last.pth.tar", experiment="tuned")) == 0

    def test_without_ema(self, options, run, fails, built):
        argv = ["--epochs", 1, "--batch-size", 24, "--resume", "auto"]
        line = fails(main, options(*argv))
        assert main(options(*argv, re.search(r"resume with (--\S+)$", line)[1])) == 0

    def test_another_precision_is_only_warned_of(self, options, run, built, capsys):
        argv = ["--epochs", 1, "--batch-size", 24, "--model-ema", "--resume", "auto", "--amp"]
        assert main(options(*argv, "--amp-dtype", "float16")) == main(options(*argv, "--amp-dtype", "bfloat16")) == 0
        assert "amp_dtype is 'bfloat16', but 'float16' in the resumed run" in capsys.readouterr().out

    def test_another_batch_size(self, options, run, fails, built):
        argv = ["--epochs", 1, "--model-ema", "--batch-size", 12, "--resume"]
        state = load(run / "last.pth.tar")
        state["position"]["batch"] = 1
        torch.save(state, run / "recovery.pth.tar")
        line = fails(main, options(*argv, "auto"))
        assert main(options(*argv, re.search(r"or go back with --resume (\S+)$", line)[1])) == 0
        torch.save(state, run / "recovery.pth.tar")
        (run / "last.pth.tar").unlink()
        assert "or start a new run with another --experiment" in fails(main, options(*argv, "auto"))
        assert main(options(*argv, "auto", experiment="other")) == 0

    def test_weights_alone(self, options, run, tmp_path, fails, built):
        torch.save({"state_dict": load(run / "last.pth.tar")["state_dict"]}, tmp_path / "weights.pth")
        argv = [tmp_path / "weights.pth", "--epochs", 1]
        assert "start from it with --initial-checkpoint" in fails(main, options("--resume", *argv, experiment="new"))
        assert main(options("--initial-checkpoint", *argv, experiment="new")) == 0

    def test_files_that_cannot_be_read(self, options, run, fails, built):
        for path in run.glob("*.pth.tar"):
            path.write_bytes(b"half")
        line = fails(main, options("--resume", "auto"))
        assert "remove the folder or pass another --experiment" in line
        assert main(options("--resume", "auto", experiment="other")) == 0
        shutil.rmtree(run)
        assert main(options("--resume", "auto")) == 0

    def test_results_of_other_columns(self, options, run, tmp_path, fails, data_dir):
        argv = ["--config", str(run / "args.yaml"), "--checkpoint", str(run / "last.pth.tar"), "--results-file"]
        (tmp_path / "own.csv").write_text("epoch,loss\n")
        assert "pass another --results-file" in fails(validate.main, [*argv, str(tmp_path / "own.csv")])
        assert validate.main([*argv, str(tmp_path / "other.csv")]) == 0

    @pytest.mark.parametrize("names", ["cat hound fish", "Katze hound Fisch"])
    def test_classes_of_other_names(self, options, run, tmp_path, fails, data_dir, capsys, names):
        copy = shutil.copytree(data_dir, tmp_path / "copy")
        for old, new in zip(("cat", "dog", "fish"), names.split(), strict=True):
            (copy / "val" / old).rename(copy / "val" / new)
        argv = ["--config", str(run / "args.yaml"), "--checkpoint", str(run / "last.pth.tar"), "--data-dir", str(copy)]
        line = fails(validate.main, argv)
        assert "if only the names differ, list them all in the checkpoint's order with --class-map" in line
        (tmp_path / "map.txt").write_text("\n".join(names.split()))
        assert validate.main([*argv, "--class-map", str(tmp_path / "map.txt")]) == 0
        assert "--class-map renames the checkpoint's classes" in capsys.readouterr().out
        (tmp_path / "map.txt").write_text("\n".join([*names.split()[1:], "cat"]))  # in another order
        assert "--class-map" in fails(validate.main, [*argv, "--class-map", str(tmp_path / "map.txt")])
