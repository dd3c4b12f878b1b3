"""The scripts of examples/ run and print what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
PRINTED = {
    "attention_alone.py": "elfatt: (1, 48, 64, 96)",
    "backbone_in_your_model.py": "step 2: loss ",
    "own_mechanism.py": "layers of MeanAttention, logits (2, 10)",
}


def test_every_example_is_run():
    assert {path.name for path in FOLDER.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_example(name):
    done = subprocess.run([sys.executable, FOLDER / name], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    assert PRINTED[name] in done.stdout
