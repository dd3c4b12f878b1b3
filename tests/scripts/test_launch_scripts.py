"""What the launch scripts hand on to the programs that they run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_script(folder, script, *options, **environment):
    """The waiting settings and the arguments of every call of Python, of which none is run."""
    (folder / "scripts").mkdir()
    for name in ("torchrun.sh", "quickstart.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    (folder / "scripts" / "setup.sh").touch()
    fake, log = folder / ".venv" / "bin" / "python", folder / "log"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        "#!/bin/bash\nif [[ $1 == -c ]]; then echo 0; exit; fi\n"
        f'echo "${{GOMP_SPINCOUNT:-}},${{OMP_WAIT_POLICY:-}} $*" >> {log}\n'
    )
    fake.chmod(0o755)
    env = {"PATH": os.environ["PATH"], **environment}
    subprocess.run(["bash", f"scripts/{script}", *options], cwd=folder, env=env, check=True, capture_output=True)
    return [tuple(line.split(" ", 1)) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, "5000,"),
        ({"NGPUS": "2"}, "5000,"),
        ({"GOMP_SPINCOUNT": "7"}, "7,"),
        ({"OMP_WAIT_POLICY": "active"}, ",active"),
    ],
)
def test_threads_wait_as_the_user_says_or_spin_briefly(environment, settings, tmp_path):
    ((found, _),) = run_script(tmp_path, "torchrun.sh", "classification.train", **environment)
    assert found == settings


def test_no_program_of_the_quickstart_spins(tmp_path):
    calls = run_script(tmp_path, "quickstart.sh")
    programs = ("classification.train", "classification.validate", "segmentation.train", "detection.train", "report")
    settings = [found for found, arguments in calls if any(name in arguments for name in programs)]
    assert settings == ["5000,"] * 5
