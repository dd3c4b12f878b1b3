"""Training from end to end: exact resume, one step of every option, and loud stops."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from classification import runtime, validate
from classification import train as program
from classification.checkpoint import load
from classification.config import parse_args
from classification.train import Trainer, main

ROOT = Path(__file__).resolve().parents[2]
RANDOM = ["--mixup", 0.8, "--cutmix", 1.0, "--smoothing", 0.1, "--reprob", 0.5, "--drop-path", 0.2]
RANDOM += ["--aa", "rand-m9-mstd0.5-inc1", "--color-jitter", 0.4]


def same(first, second):
    """Compares nested containers of tensors exactly."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def assert_same_end(first, second):
    first, second = load(first / "last.pth.tar"), load(second / "last.pth.tar")
    for key in ("state_dict", "state_dict_ema", "optimizer", "scheduler", "amp_scaler", "position", "processes"):
        assert (key in first) == (key in second)
        assert key not in first or same(first[key], second[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "workers"),
    [
        ([*RANDOM, "--model-ema", "--model-ema-decay", 0.9, "--clip-grad", 5], 2),
        ([*RANDOM, "--grad-accum-steps", 2, "--amp", "--amp-dtype", "float16"], 0),
    ],
    ids=["ema", "accumulation-fp16"],
)
def test_a_killed_and_resumed_run_ends_bit_identical(options, command, tmp_path, extra, workers):
    extra = [*extra, "--batch-size", 2, "--recovery-interval", 2, "--epochs", 3, "--warmup-epochs", 1]
    assert main(options(*extra, "--workers", workers, experiment="whole")) == 0

    killed = options(*extra, "--workers", workers, experiment="killed")
    process = subprocess.Popen(**command("classification.train", *killed), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "epoch 1: batch 6/12" in line:
            os.kill(process.pid, signal.SIGKILL)  # in mid-epoch, after the save at batch 4 and maybe the next
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    position = load(tmp_path / "killed" / "recovery.pth.tar")["position"]
    assert position["epoch"] == 1 and 0 < position["batch"] < 12

    other_workers = 1 if workers == 2 else 2
    assert main(options(*extra, "--workers", other_workers, "--resume", "auto", experiment="killed")) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    rows = [(tmp_path / name / "summary.csv").read_text() for name in ("whole", "killed")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 4


STEPS = {"accumulating": (1, 1), "last": (1, 6)}


@pytest.mark.parametrize("moment", [*STEPS, "validating"])
def test_a_preempted_run_saves_its_next_update_and_resumes_bit_identical(
    options, tmp_path, monkeypatch, capsys, moment
):
    extra = [*RANDOM, "--batch-size", 4, "--grad-accum-steps", 2, "--model-ema", "--model-ema-decay", 0.9]
    number = signal.SIGUSR1 if moment == "accumulating" else signal.SIGTERM
    assert main(options(*extra, experiment="whole")) == 0

    step, evaluate = Trainer.train_step, program.evaluate

    def train_step(self, *args):
        if (self.state.epoch, self.state.batch + 1) == STEPS.get(moment):
            os.kill(os.getpid(), number)
        return step(self, *args)

    def interrupted(*args):
        if moment == "validating":
            os.kill(os.getpid(), number)
        return evaluate(*args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        patch.setattr(program, "evaluate", interrupted)
        capsys.readouterr()
        assert main(options(*extra, experiment="stopped")) == 128 + signal.SIGTERM
    assert signal.getsignal(number) is before
    place = {"accumulating": "1, batch 2", "last": "1, batch 6", "validating": "0, batch 6"}
    *_, line = capsys.readouterr().out.splitlines()
    assert line.endswith(f"preempted at epoch {place[moment]}; resume with --resume auto")
    assert main(options(*extra, "--resume", "auto", experiment="stopped")) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    rows = [(tmp_path / name / "summary.csv").read_text() for name in ("whole", "stopped")]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["validate", "save_epoch"])
def test_a_run_stopped_between_an_epochs_end_and_its_checkpoint_goes_on(options, tmp_path, monkeypatch, moment):
    extra = [*RANDOM, "--model-ema", "--model-ema-decay", 0.9]
    assert main(options(*extra, experiment="whole")) == 0

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        if moment == "validate":
            patch.setattr(Trainer, "validate", stop)
        else:
            patch.setattr(program.AtomicSaver, "_duplicate", stop)  # `last` is new, the best is not linked yet
        main(options(*extra, experiment="stopped"))
    assert main(options(*extra, "--resume", "auto", experiment="stopped")) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    for name in ("model_best", "checkpoint-0", "checkpoint-1"):
        first, second = (load(tmp_path / run / f"{name}.pth.tar") for run in ("whole", "stopped"))
        assert same(first["state_dict_ema"], second["state_dict_ema"])


def test_everything_a_run_leaves_behind(options, tmp_path):
    assert main(options("--model-ema", "--cooldown-epochs", 1)) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events")}
    epochs = {f"checkpoint-{epoch}.pth.tar" for epoch in range(3)}
    assert names == {"args.yaml", "summary.csv", "last.pth.tar", "model_best.pth.tar", *epochs}
    assert any(path.name.startswith("events") for path in folder.iterdir())
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["batch-size"] == 8 and args["num-classes"] == 3
    header, *rows = (folder / "summary.csv").read_text().splitlines()
    assert header.startswith("epoch,train_loss,eval_raw_top1") and "eval_ema_top1" in header and len(rows) == 3
    state = load(folder / "last.pth.tar")
    assert state["args"]["model"] == "cswin_nano_elfatt" and state["position"] == {"epoch": 3, "batch": 0, "updates": 9}
    best = max(rows, key=lambda row: float(row.split(",")[header.split(",").index("eval_ema_top1")]))
    assert load(folder / "model_best.pth.tar")["epoch"] == int(best.split(",")[0])


@pytest.mark.parametrize(
    "extra",
    [
        ["--amp", "--amp-dtype", "bfloat16", "--channels-last"],
        ["--amp", "--amp-dtype", "float16", "--clip-grad", 1],
        ["--model", "cswin_tiny_agent", "--channels-last", "--model-kwargs", "depths=[1,1,1,1]", "embed_dim=16"],
        ["--grad-checkpointing", "--smoothing", 0.1, "--mixup", 0.2, "--mixup-mode", "elem"],
        ["--model", "swin_nano_elfatt", "--opt", "sgd", "--opt-kwargs", "nesterov=True", "--no-filter-bias-and-bn"],
        ["--model", "resnet18", "--validation-batch-size", 3, "--dataset", "torch/image_folder"],
    ],
    ids=["bf16", "fp16", "agent-channels-last", "checkpointing", "sgd", "convolutional"],
)
def test_every_mode_takes_a_step(options, tmp_path, extra):
    assert main(options(*extra, "--epochs", 1, "--batch-size", 24)) == 0
    state = load(tmp_path / "run" / "last.pth.tar")
    assert state["position"]["updates"] == 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert ("amp_scaler" in state) == ("float16" in extra)


def test_images_are_erased_after_they_are_mixed(options):
    extra = ["--mixup", 0.8, "--cutmix", 0, "--reprob", 1, "--remode", "const"]
    trainer = Trainer(parse_args(options(*extra), train=True))
    seen = []
    trainer.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    images = torch.arange(1.0, 5)[:, None, None, None].expand(4, 3, 32, 32).contiguous()
    trainer.train_step(images, torch.tensor([0, 1, 2, 0]), True)
    for image in seen[0]:
        values = image.unique()
        assert len(values) == 2 and values[0] == 0 and 1 <= values[1] <= 4  # erased, and one blend of two images


@pytest.mark.parametrize("given", ["option", "config"])
def test_the_backend_is_run_and_recorded(options, tmp_path, backends_run, capsys, given):
    (tmp_path / "math.yaml").write_text("backend: math\n")
    extra = ["--backend", "math"] if given == "option" else ["--config", tmp_path / "math.yaml"]
    assert main(options(*extra, "--epochs", 1)) == 0
    assert backends_run == {"math"} and "backend math, output in" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["backend"] == "math"


def test_a_run_resumes_under_another_backend(options, tmp_path, backends_run):
    assert main(options("--backend", "math")) == 0
    (tmp_path / "run" / "checkpoint-0.pth.tar").replace(tmp_path / "run" / "last.pth.tar")
    backends_run.clear()
    assert main(options("--backend", "reference", "--resume", "auto")) == 0
    assert backends_run == {"reference"}
    args = [load(tmp_path / "run" / f"{name}.pth.tar")["args"] for name in ("checkpoint-1", "last")]
    assert [each["backend"] for each in args] == ["reference"] * 2


def test_a_backend_that_cannot_run_takes_one_line(options, tmp_path, fails, monkeypatch):
    (tmp_path / "own.yaml").write_text("backend: fast\n")
    assert "argument --backend: invalid choice: 'fast'" in fails(main, options("--backend", "fast"))
    assert "own.yaml: backend: 'fast' is not one of auto, " in fails(main, options("--config", tmp_path / "own.yaml"))
    monkeypatch.setattr("elfatt.ops.pytorch._has_flash_attn", lambda: False)
    line = fails(main, options("--backend", "flash_attn"))
    assert line.startswith("train.py: error: backend 'flash_attn' cannot run: it is not installed: pip install")
    monkeypatch.setattr("elfatt.ops.pytorch._has_flash_attn", lambda: True)
    assert "it needs CUDA tensors, not cpu" in fails(main, options("--backend", "flash_attn"))
    assert not (tmp_path / "run").exists()


def test_the_environment_names_the_default_backend(options, command, tmp_path):
    program = command("classification.train", *options("--epochs", 1), ELFATT_BACKEND="math")
    done = subprocess.run(**program, capture_output=True, text=True, check=True)
    assert "backend math, output in" in done.stdout
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["backend"] == "math"


def test_learning_rate_follows_warm_up_cosine_and_cool_down(options):
    extra = [
        "--epochs",
        4,
        "--warmup-epochs",
        2,
        "--warmup-lr",
        0.1,
        "--lr",
        1.0,
        "--min-lr",
        0.2,
        "--cooldown-epochs",
        2,
    ]
    trainer = Trainer(parse_args(options(*extra), train=True))
    rates = []
    for epoch in range(trainer.num_epochs):
        trainer.state.scheduler.step(epoch)
        rates.append(trainer.state.optimizer.param_groups[0]["lr"])
    cosine = [0.2 + 0.4 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (2, 3)]
    assert rates == pytest.approx([0.1, 0.55, *cosine, 0.2, 0.2])


@pytest.mark.parametrize("model", ["cswin_nano_elfatt", "swin_nano_elfatt"])
def test_weight_decay_spares_vectors_biases_and_what_the_model_names(options, model):
    trainer = Trainer(parse_args(options("--model", model, "--weight-decay", 0.1), train=True))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    spared = trainer.model.no_weight_decay()
    for group in trainer.state.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            free = parameter.ndim <= 1 or name.endswith(".bias") or name in spared
            assert group["weight_decay"] == (0 if free else 0.1), name
    assert not names
    trainer = Trainer(parse_args(options("--model", model, "--weight-decay", 1e-8, "--no-filter-bias-and-bn"), True))
    assert [group["weight_decay"] for group in trainer.state.optimizer.param_groups] == [1e-8]


def test_ema_follows_every_update_and_only_updates(options, monkeypatch):
    extra = ["--model-ema", "--model-ema-decay", 0.5, "--batch-size", 4, "--grad-accum-steps", 3]
    trainer = Trainer(parse_args(options(*extra), train=True))
    calls = []
    monkeypatch.setattr(trainer.state.ema, "update", lambda model: calls.append(trainer.state.batch))
    trainer.train_epoch()
    assert calls == [2, 5]


def test_accumulated_gradients_are_those_of_the_joined_batch(options, monkeypatch):
    gradients = []
    for batch, steps in ((24, 1), (8, 3)):
        trainer = Trainer(parse_args(options("--batch-size", batch, "--grad-accum-steps", steps), train=True))
        monkeypatch.setattr(trainer.state.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.state.optimizer, "zero_grad", lambda: None)
        trainer.train_epoch()
        gradients.append([parameter.grad.clone() for parameter in trainer.parameters])
        trainer.folder.joinpath("recovery.pth.tar").unlink()
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


# --- loud stops ---


def test_a_loss_that_is_not_finite_stops_with_the_state_before_it(options, tmp_path, fails):
    line = fails(main, options("--opt", "sgd", "--lr", 1e30))
    assert "the loss is nan at epoch 0, batch 1, update 1, learning rate 1e+30" in line
    path = tmp_path / "run" / "nan.pth.tar"
    assert str(path) in line and "start a new run (--experiment) with a lower --lr" in line
    assert load(path)["position"]["updates"] == 1
    assert load(path.with_name("nan-batch-rank0.pth.tar"))["images"].shape == (8, 3, 32, 32)


def test_a_run_is_not_overwritten_and_a_wrong_resume_is_refused(options, tmp_path, fails):
    assert main(options()) == 0
    assert "contains a run: resume it with --resume auto" in fails(main, options())
    last = tmp_path / "run" / "last.pth.tar"
    resume = ["--resume", last]
    line = fails(main, options(*resume, "--model", "swin_nano_elfatt"))
    assert "is a checkpoint of cswin_nano_elfatt, not of swin_nano_elfatt" in line
    assert "resume with --no-model-ema" in fails(main, options(*resume, "--model-ema"))
    assert "does not fit this model" in fails(main, options(*resume, "--model-kwargs", "mlp_ratio=3"))
    torch.save({"state_dict": load(last)["state_dict"]}, tmp_path / "weights.pth")
    assert "start from it with --initial-checkpoint" in fails(
        main, options("--resume", tmp_path / "weights.pth", experiment="new")
    )
    assert "does not exist" in fails(main, options("--resume", tmp_path / "none.pth", experiment="new"))
    (tmp_path / "half.pth").write_bytes(last.read_bytes()[:1000])
    assert "cannot be read" in fails(main, options("--resume", tmp_path / "half.pth", experiment="new"))
    line = fails(main, options(*resume, "--lr", 1))
    assert "--lr is 1.0, but" in line and "start a new run from its weights with --initial-checkpoint" in line
    assert main(options(experiment="other")) == 0
    assert "other contains a run" in fails(main, options(*resume, experiment="other"))


def test_an_explicit_resume_replaces_an_abandoned_position(options, tmp_path, monkeypatch):
    """`--resume checkpoint-0` goes back; what a later position left behind must not win afterwards."""
    stop = Trainer.validate

    def in_epoch_1(self):
        return stop(self) if self.state.epoch == 0 else 1 / 0

    monkeypatch.setattr(Trainer, "validate", in_epoch_1)
    with pytest.raises(ZeroDivisionError):
        main(options())
    assert load(tmp_path / "run" / "recovery.pth.tar")["position"]["epoch"] == 1
    Trainer(parse_args(options("--resume", tmp_path / "run" / "checkpoint-0.pth.tar"), train=True))
    assert load(tmp_path / "run" / "recovery.pth.tar")["position"] == {"epoch": 1, "batch": 0, "updates": 3}


def test_a_position_inside_an_epoch_needs_the_same_batches(options, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(Trainer, "validate", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(options())
    line = fails(main, options("--resume", "auto", "--batch-size", 4))
    assert "is a mid-epoch checkpoint of 1 processes × 8 images: resume with the same, not 1 × 4" in line


def test_bad_model_options_take_one_line(options, fails):
    assert "optimizer adamm cannot be built with {}" in fails(main, options("--opt", "adamm"))
    line = fails(main, options("--model-kwargs", "block_sized=7"))
    assert "cannot be built with" in line and "block_sized" in line
    line = fails(main, options("--device", "cuda")) if not torch.cuda.is_available() else "pass --device cpu"
    assert "pass --device cpu" in line


@pytest.mark.slow
def test_initial_weights_are_the_averaged_ones(options, tmp_path, fails):
    assert main(options("--model-ema", "--model-ema-decay", 0.5)) == 0
    path = tmp_path / "run" / "last.pth.tar"
    weights = load(path)["state_dict_ema"]
    trainer = Trainer(parse_args(options("--initial-checkpoint", path, experiment="next"), train=True))
    assert same(dict(trainer.model.state_dict()), dict(weights))
    line = fails(main, options("--initial-checkpoint", path, "--model", "resnet18", experiment="other"))
    assert f"cannot load {path} into" in line


def test_the_classes_of_a_run_are_compared_when_it_goes_on(options, data_dir, tmp_path, fails, capsys):
    assert main(options("--epochs", 1)) == 0
    path = tmp_path / "run" / "last.pth.tar"
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    for split in ("train", "val"):
        (copy / split / "dog").rename(copy / split / "hound")
    line = fails(main, options("--epochs", 1, "--resume", "auto", data=copy))
    assert f"the dataset's classes differ from those of {path}: 1 surplus ('hound'), 1 missing ('dog')" in line
    capsys.readouterr()
    assert main(options("--epochs", 1, "--initial-checkpoint", path, data=copy, experiment="tuned")) == 0
    assert "the classifier starts from other classes: 1 surplus ('hound')" in capsys.readouterr().out
    anew = ["--initial-checkpoint", path, "--allow-mismatch", "head.", "--epochs", 1]
    assert main(options(*anew, "--num-classes", 3, data=copy, experiment="anew")) == 0


def test_a_system_without_the_resource_module_trains(options, command):
    """Windows has none."""
    code = "import sys\nsys.modules['resource'] = None\n"
    code += "from classification.train import main\nsys.exit(main(sys.argv[1:]))"
    process = command("classification.train", *options("--epochs", 1))
    process["args"][1:3] = ["-c", code]
    done = subprocess.run(**process, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "images_per_s" in done.stdout and "memory_mib" not in done.stdout


def test_a_system_without_tensorboard_trains(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(options("--epochs", 1)) == 0
    assert "no TensorBoard logs, only summary.csv: pip install tensorboard" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("events*")) and (tmp_path / "run" / "summary.csv").exists()


def test_a_console_without_every_character_shows_the_log(options, command):
    program = command("classification.train", *options("--epochs", 1), PYTHONIOENCODING="ascii")
    done = subprocess.run(**program, capture_output=True, encoding="ascii")
    assert done.returncode == 0 and done.stderr == ""
    assert "1 ? cpu, backend" in done.stdout


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_in_mib_on_every_system(monkeypatch, platform, unit):
    monkeypatch.setattr(runtime.sys, "platform", platform)
    peak = types.SimpleNamespace(ru_maxrss=3 * 2**20 // unit)
    monkeypatch.setattr(runtime.resource, "getrusage", lambda _: peak)
    assert runtime.peak_memory_mib(torch.device("cpu")) == 3


class TestIterable:
    """A reader without random access: order and epoch are its own, checkpoints come at epoch ends."""

    @pytest.fixture(autouse=True)
    def streams(self, monkeypatch):
        from PIL import Image
        from timm.data.dataset import IterableImageDataset
        from timm.data.readers.reader_image_folder import ReaderImageFolder

        class Stream(ReaderImageFolder):
            def __iter__(self):
                worker = torch.utils.data.get_worker_info()
                mine = self.samples[worker.id :: worker.num_workers] if worker else self.samples
                for path, label in mine:
                    yield Image.open(path).convert("RGB"), label

        def create(name, root, split, **_):
            return IterableImageDataset(root, reader=Stream(f"{root}/{split}"))

        monkeypatch.setattr("classification.splits.create_dataset", create)

    @pytest.mark.slow
    def test_a_preempted_epoch_is_repeated(self, options, tmp_path, monkeypatch, capsys):
        extra = ["--dataset", "wds/", *RANDOM, "--workers", 1]
        assert main(options(*extra, experiment="whole")) == 0
        step = Trainer.train_step

        def train_step(self, *args):
            if self.state.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", train_step)
            assert main(options(*extra, experiment="stopped")) == 128 + signal.SIGTERM
        assert "epoch 1, batch 1; wds/ cannot seek: --resume auto repeats the epoch" in capsys.readouterr().out
        assert main(options(*extra, "--resume", "auto", experiment="stopped")) == 0
        assert_same_end(tmp_path / "whole", tmp_path / "stopped")

    @pytest.mark.slow
    def test_epochs_resume_exactly(self, options, tmp_path, capsys):
        extra = ["--dataset", "wds/", *RANDOM, "--workers", 1, "--recovery-interval", 1]
        assert main(options(*extra, experiment="whole")) == 0
        assert "wds/ cannot seek: checkpoints at the end of each epoch only" in capsys.readouterr().out
        assert main(options(*extra, experiment="two")) == 0
        for name in ("checkpoint-1", "model_best"):
            (tmp_path / "two" / f"{name}.pth.tar").unlink()
        (tmp_path / "two" / "checkpoint-0.pth.tar").replace(tmp_path / "two" / "last.pth.tar")
        assert main(options(*extra, "--resume", "auto", experiment="two")) == 0
        assert_same_end(tmp_path / "whole", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("vmamba_tiny", ["embed_dim=16", "depths=(1,1,1,1)"]),
        ("convnext_tiny", ["dims=(16,32,64,128)", "depths=(1,1,1,1)"]),
        ("efficientvit_b2", ["widths=(8,16,16,32,32)", "depths=(1,1,1,1,1)", "head_widths=(32,32)"]),
    ],
)
def test_the_other_systems_of_the_tables_train_and_are_evaluated(options, tmp_path, model, kwargs):
    extra = ["--model", model, "--model-kwargs", *kwargs, "--epochs", 1, "--model-ema", "--drop-path", 0.1]
    if model == "efficientvit_b2":  # timm's has no stochastic depth
        extra = extra[:-2]
    assert main(options(*extra, "--grad-checkpointing")) == 0
    data, results = options()[1], tmp_path / "results.json"
    arguments = ["--data-dir", data, *extra[: 3 + len(kwargs)], "--num-classes", 3, "--img-size", 32, "--no-amp"]
    arguments += ["--device", "cpu", "--workers", 0, "--results-file", results]
    assert validate.main([*map(str, arguments), "--checkpoint", str(tmp_path / "run" / "last.pth.tar")]) == 0
    assert json.loads(results.read_text())["weights"] == "ema"
