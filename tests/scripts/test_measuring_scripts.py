"""The scripts that measure call commands that exist, with options that these take."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from elfatt.analysis.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def commands_of(script, folder, *options, gpu=0, **environment):
    """The calls of ``python -m elfatt.analysis`` that a script makes, of which none is run."""
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / script, folder / "scripts")
    fake, log = folder / "bin" / "python", folder / "log"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/bash\nif [[ $1 == -c ]]; then echo {gpu}; exit; fi\nprintf "%s\\t" "$@" >> {log}\necho >> {log}\n'
    )
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}", **environment}
    subprocess.run(["bash", f"scripts/{script}", *options], cwd=folder, env=env, check=True, capture_output=True)
    calls = [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]
    return [call[2:] for call in calls if call[:2] == ["-m", "elfatt.analysis"]]


@pytest.mark.parametrize(
    ("script", "options", "settings"),
    [
        ("reproduce_tables.sh", ["--batch-size", "4", "--compile"], {}),
        ("reproduce_tables.sh", [], {"TABLES": "1 9", "CHECKPOINTS": "a b", "IMAGENET": "c", "PRECISION": "float32"}),
        ("edge_benchmark.sh", ["--repeats", "2"], {"BATCH": "4", "ROWS": "*-ELFATT *-GLOBAL"}),
        ("gpu_suite.sh", [], {"gpu": 0}),
        ("gpu_suite.sh", [], {"gpu": 1, "BATCH": "64", "REPEATS": "3"}),
    ],
)
def test_every_command_is_understood(script, options, settings, tmp_path, monkeypatch):
    calls, understood = commands_of(script, tmp_path, *options, **settings), []
    for name, module in COMMANDS.items():
        monkeypatch.setattr(module, "run", lambda args, name=name: understood.append((name, args)))
    for call in calls:
        assert main(call) == 0
    names = [name for name, _ in understood]
    assert len(names) == len(calls)
    if script == "edge_benchmark.sh":
        assert names == ["runtimes", "runtimes", "report"]
        assert [(args.table, args.batch_size, args.rows) for _, args in understood[:2]] == [
            (table, 4, ["*-ELFATT", "*-GLOBAL"]) for table in (8, 9)
        ]
        return
    assert names[-2:] == ["plot", "report"]
    if script == "gpu_suite.sh":
        assert {"op", "tables", "scaling"} <= set(names)
        assert any(args.cuda_graphs for name, args in understood if name == "op") == bool(settings["gpu"])
    else:
        tables = [args.tables for name, args in understood if name == "tables"]
        edges = [args.table for name, args in understood if name == "edge"]
        assert [*sum(tables, []), *edges] == ([1, 9] if settings else list(range(1, 10)))
        first = next(args for name, args in understood if name == "tables")
        assert ("accuracy" in first.measure) == bool(settings) and first.precision == settings.get("PRECISION", "amp")
        assert first.checkpoints == (Path("a b") if settings else None)
