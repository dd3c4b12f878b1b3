"""Two gloo processes train as one with the joined batch, and resume as if they had never been killed."""

import os
import signal
import subprocess
import traceback
import warnings

import pytest
import torch

from classification import train as program
from classification.checkpoint import load
from classification.train import Trainer, main
from tests.processes import join_as, open_store

# plain SGD without momentum: the change of the weights is the gradient
PLAIN = ["--opt", "momentum", "--opt-kwargs", "momentum=0.0", "--lr", 0.1, "--weight-decay", 0, "--epochs", 1]


def run_two(options, monkeypatch, kill_at=None):
    """Runs `train.py` in two forked processes, with the environment that torchrun gives; returns their exit codes.

    `kill_at`: after that many batches both processes kill themselves.
    """
    store = open_store()
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            join_as(rank, store)
            batches, step = [], Trainer.train_step

            def train_step(self, *args, batches=batches, step=step):
                batches.append(1)
                if len(batches) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, *args)

            monkeypatch.setattr(program.Trainer, "train_step", train_step)
            warnings.filterwarnings("error", "Grad strides")  # DDP's, of gradients laid out unlike their parameters
            try:
                os._exit(main(options))
            except BaseException:
                traceback.print_exc()
                os._exit(3)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_give_the_gradients_of_the_joined_batch(options, tmp_path, monkeypatch, accumulation):
    extra = [*PLAIN, "--smoothing", 0.1, "--aa", "rand-m9-mstd0.5-inc1"]  # augmentation depends on the image alone
    batch = 12 // (2 * accumulation)
    two = options(*extra, "--grad-accum-steps", accumulation, "--batch-size", batch, experiment="two")
    assert run_two(two, monkeypatch) == [0, 0]
    assert main(options(*extra, "--batch-size", 12, experiment="one")) == 0
    first, second = (load(tmp_path / name / "last.pth.tar") for name in ("one", "two"))
    assert first["position"]["updates"] == second["position"]["updates"] == 2
    assert len(second["processes"]) == 2
    for name, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_killed_processes_resume_bit_identical(options, tmp_path, monkeypatch):
    extra = ["--mixup", 0.8, "--reprob", 0.5, "--drop-path", 0.2, "--model-ema", "--model-ema-decay", 0.9]
    extra += ["--batch-size", 2, "--recovery-interval", 2, "--workers", 1]
    assert run_two(options(*extra, experiment="whole"), monkeypatch) == [0, 0]

    killed = run_two(options(*extra, experiment="killed"), monkeypatch, kill_at=6 + 4)
    assert -signal.SIGKILL in killed and 0 not in killed
    position = load(tmp_path / "killed" / "recovery.pth.tar")["position"]
    assert position["epoch"] == 1 and position["batch"] == 2
    assert run_two(options(*extra, "--resume", "auto", experiment="killed"), monkeypatch) == [0, 0]
    first, second = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "killed"))
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(first[key][name], second[key][name]) for name in first[key])
    states = [process["rng"]["torch"] for process in first["processes"]]
    assert not torch.equal(*states)  # each process draws its own numbers


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_processes_at_the_same_step(options, command, tmp_path, monkeypatch):
    """SIGUSR1, which the launcher turns into torchrun's own SIGTERM."""
    extra = ["--mixup", 0.8, "--drop-path", 0.2, "--batch-size", 2, "--workers", 1, "--recovery-interval", 0]
    assert run_two(options(*extra, experiment="whole"), monkeypatch) == [0, 0]

    argv = options(*extra, experiment="stopped")
    run = command("scripts/torchrun.sh", "classification.train", *argv, NGPUS="2", PYTHONUNBUFFERED="1")
    process = subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "epoch 0: batch 1/6" in line:
            process.send_signal(signal.SIGUSR1)
    assert process.wait() == 128 + signal.SIGTERM
    assert sum("preempted at epoch " in line for line in lines) == 1 and "Traceback (" not in "".join(lines)
    assert (tmp_path / "stopped" / "recovery.pth.tar").exists()

    assert run_two([*argv, "--resume", "auto"], monkeypatch) == [0, 0]
    first, second = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "stopped"))
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


NARROW = ["--model-kwargs", "depths=[1,1,1,1]", "embed_dim=16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        ["--channels-last"],
        ["--backend", "sdpa"],
        ["--backend", "reference", "--channels-last"],
        ["--model", "cswin_tiny_agent", *NARROW, "--channels-last"],
        ["--model", "cswin_tiny_flatten", *NARROW],
        ["--model", "cswin_tiny_local", *NARROW, "--backend", "sdpa"],
        ["--model", "convnext_tiny", "--model-kwargs", "depths=[1,1,1,1]", "dims=[16,32,64,128]"],
    ],
    ids=" ".join,
)
def test_gradients_lie_as_their_parameters_do(options, monkeypatch, extra):
    assert run_two(options(*extra, "--epochs", 1), monkeypatch) == [0, 0]
