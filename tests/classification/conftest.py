"""A tiny image folder, a tiny model, and the shortest command line that trains it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("cat", "dog", "fish")


def make_folder(root: Path, train: int = 8, val: int = 5, classes=CLASSES, side: int = 20) -> Path:
    """Writes `train` and `val` images a class, each class a colour with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (side, side, 3))
                pixels[..., label % 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def write_images():
    """`make_folder`, for the tests that need a folder of their own."""
    return make_folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def one_thread():
    """The same arithmetic in this process and in the subprocesses; the programs' log handlers go afterwards."""
    handlers, threads = logging.root.handlers[:], torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.root.handlers[:] = handlers


@pytest.fixture
def options(data_dir, tmp_path):
    """Options of the smallest run: 24 images of 3 classes, 32 × 32 pixels, two epochs of three updates."""

    def build(*extra: object, data: Path = data_dir, experiment: str = "run") -> list[str]:
        values = {
            "--data-dir": data,
            "--model": "cswin_nano_elfatt",
            "--num-classes": 3,
            "--img-size": 32,
            "--batch-size": 8,
            "--workers": 0,
            "--device": "cpu",
            "--epochs": 2,
            "--warmup-epochs": 0,
            "--cooldown-epochs": 0,
            "--log-interval": 1,
            "--output": tmp_path,
            "--experiment": experiment,
        }
        return [str(item) for pair in values.items() for item in pair] + ["--no-amp", *map(str, extra)]

    return build


@pytest.fixture
def command():
    """Builds a subprocess of a module or a shell script of the repository: one thread, no GPU."""

    def build(program: str, *arguments: object, **env: str) -> dict:
        interpreter = ["bash", str(ROOT / program)] if program.endswith(".sh") else [sys.executable, "-m", program]
        args = [*interpreter, *map(str, arguments)]
        return {"args": args, "env": {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}}

    return build


@pytest.fixture
def fails(capsys):
    """Runs a program's `main` and returns its one line of error; no traceback may reach the user."""

    def run(main, options: list[str]) -> str:
        try:
            code = main(options)
        except SystemExit as stop:
            code = stop.code
        lines = capsys.readouterr().err.strip().splitlines()
        assert code in (1, 2)
        assert len(lines) == 1, lines
        return lines[0]

    return run
