"""Every program prints on a console that lacks characters."""

import io
import sys

import pytest

from classification import runtime
from elfatt.analysis.__main__ import main as analyse
from elfatt.checkpoints.__main__ import main as convert
from elfatt.conversion import Plan
from elfatt.conversion.plan import Head, LayerPlan
from elfatt.export.__main__ import main as export

PROGRAMS = {
    "classification": lambda: runtime.run_main("train.py", lambda: None),
    "analysis": lambda: analyse(["-h"]),
    "checkpoints": lambda: convert(["-h"]),
    "export": lambda: export(["-h"]),
}


def dense():
    from elfatt.integrations import mm_errors

    mm_errors.run(lambda: None)


@pytest.mark.parametrize("run", [*PROGRAMS.values(), dense], ids=[*PROGRAMS, "dense"])
def test_programs_replace_what_the_console_lacks(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii"))
    try:
        run()
    except SystemExit as stop:
        assert stop.code == 0
    print("2 × 2", file=sys.stdout, flush=True)
    assert sys.stdout.buffer.getvalue().endswith(b"2 ? 2" + b"\n")


def test_a_plan_prints_in_ascii():
    plan = Plan("model", {"layer": LayerPlan((Head("block", 8), Head("linear")), 1024)}, True)
    assert str(plan).isascii()
