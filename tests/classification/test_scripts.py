"""The shell scripts: usage, and the command that they hand to torchrun."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("torchrun.sh", "train_imagenet.sh", "finetune_imagenet_384.sh", "evaluate_imagenet.sh")
SCRIPTS += ("train_ade20k.sh", "evaluate_ade20k.sh", "train_coco.sh", "evaluate_coco.sh")


@pytest.fixture
def checkout(tmp_path):
    """The scripts beside a Python that sees four GPUs and prints what it is asked to run."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\n[[ $1 == -c ]] && echo 4 && exit\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def run(checkout, name, *arguments, **env):
    script = str(checkout / "scripts" / name)
    return subprocess.run(
        ["bash", script, *arguments], env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_usage(checkout, name):
    for arguments, code in ((["--help"], 0), ([], 2)):
        result = run(checkout, name, *arguments)
        assert result.returncode == code and result.stdout.startswith(f"usage: bash scripts/{name} ")


@pytest.mark.parametrize(
    ("name", "given", "command"),
    [
        ("train_imagenet.sh", ["a b", "D"], "train --config a b --data-dir D"),
        ("finetune_imagenet_384.sh", ["C", "D", "W"], "train --config C --data-dir D --initial-checkpoint W"),
        ("evaluate_imagenet.sh", ["C", "D", "W"], "validate --config C --data-dir D --checkpoint W"),
    ],
)
def test_all_gpus_and_further_options(checkout, name, given, command):
    lines = run(checkout, name, *given, "--lr", "1").stdout.splitlines()
    launch = "-m elfatt.launch --standalone --nproc-per-node 4 -m classification."
    assert " ".join(lines) == f"{launch}{command} --lr 1"
    assert ("a b" in lines) == ("a b" in given)  # one argument


def test_several_nodes(checkout):
    env = {"NGPUS": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host"}
    place = "--nnodes 2 --node-rank 1 --master-addr host --master-port 29500 --nproc-per-node 8"
    assert place in " ".join(run(checkout, "train_imagenet.sh", "C", "D", **env).stdout.splitlines())
    del env["NODE_RANK"]
    result = run(checkout, "train_imagenet.sh", "C", "D", **env)
    assert result.returncode != 0 and "NNODES=2 needs NODE_RANK" in result.stderr


def run_template(checkout, name, srun):
    """With a scontrol that knows two nodes and names what it requeues, and a given srun."""
    scontrol = "[[ $1 == requeue ]] && echo requeued $2 || printf 'first\\nsecond\\n'"
    for tool, action in (("scontrol", scontrol), ("srun", srun)):
        file = checkout / "bin" / tool
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{action}\n")
        file.chmod(0o755)
    env = {"PATH": f"{checkout / 'bin'}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_ID": "20007"}
    env |= {"SLURM_JOB_NODELIST": "nodes", "SLURM_CPUS_PER_TASK": "8"}
    script = ["bash", "scripts/slurm/train.sbatch", name, "a b", "D", "--lr", "1"]
    return subprocess.run(script, cwd=checkout, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("code", [143, 1, 0])
def test_a_job_requeues_itself_when_its_run_was_preempted(checkout, code):
    result = run_template(checkout, "train_imagenet.sh", f"exit {code}")
    assert result.returncode == code
    assert result.stdout.splitlines() == (["requeued 20007"] if code == 143 else [])


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("train_imagenet.sh", "classification.train --config a b --data-dir D --lr 1 --resume auto"),
        ("train_ade20k.sh", "segmentation.train a b --data-dir D --lr 1 --resume auto"),
        ("train_coco.sh", "detection.train a b --data-dir D --lr 1 --resume auto"),
    ],
)
def test_slurm_template(checkout, name, command):
    result = run_template(checkout, name, 'SLURM_NODEID=1 exec "$@"')
    assert result.returncode == 0
    place = "--nnodes 2 --node-rank 1 --master-addr first --master-port 20007 --nproc-per-node 4"
    assert " ".join(result.stdout.splitlines()) == f"-m elfatt.launch {place} -m {command}"
    assert "a b" in result.stdout.splitlines()  # one argument
