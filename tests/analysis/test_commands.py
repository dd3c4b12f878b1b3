"""The other commands of the analysis: scaling, edge, op, plot, report, on nano models."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from elfatt.analysis import edge, environment, plots, report, runtimes, scaling
from elfatt.analysis.__main__ import COMMANDS, main
from elfatt.analysis.results import load_runs
from elfatt.analysis.rivals import RIVALS, published_top1
from elfatt.attention.elfatt import ELFATT
from elfatt.ops import active_backend
from elfatt.ops.plain import PlainBackend

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--device", "cpu", "--repeats", "2", "--warm-up", "0", "--precision", "float32"]


def is_drawn(path):
    return np.asarray(Image.open(path).convert("L")).std() > 5


def rows_of(path):
    (run,) = load_runs(path)
    return run["rows"]


@pytest.mark.parametrize("attention", scaling.WAYS)
def test_every_curve_has_a_style(attention, tmp_path):
    row = {"model": "cswin_nano_elfatt", "attention": attention, "latency_ms": 1.0}
    rows = [row | {"height": side, "width": side} for side in (32, 64)]
    assert plots.draw_scaling(rows, tmp_path / "curves.png")
    assert is_drawn(tmp_path / "curves.png")


def test_scaling_measures_every_model_size_and_attention(tmp_path, capsys):
    models, path = ["cswin_nano_elfatt", "swin_nano_elfatt"], tmp_path / "m.json"
    argv = ["scaling", "--models", *models, "--sizes", "32", "64x96", "--results", str(path), *FAST]
    assert main([*argv, "--plot", str(tmp_path / "curves.png")]) == 0
    rows = rows_of(path)
    assert [(r["model"], r["attention"], r["height"], r["width"]) for r in rows] == [
        (model, attention, *size) for size in ((32, 32), (64, 96)) for model in models for attention in ("nfa", "fa")
    ]
    for row in rows:
        base = next(r for r in rows if r["model"] == models[0] and all(r[k] == row[k] for k in ("attention", "height")))
        assert row["speedup"] == pytest.approx(base["latency_ms"] / row["latency_ms"])
        assert row["images_per_s"] == pytest.approx(1e3 / row["latency_ms"]) and row["counted_memory_mib"] > 0
    assert is_drawn(tmp_path / "curves.png")
    assert capsys.readouterr().out.count("| 64×96 |") == 4


def test_scaling_runs_are_joined_at_other_sizes_only():
    def run(side, batch, model="cswin_tiny_elfatt"):
        row = {"model": model, "attention": "fa", "height": side, "width": side}
        return {"kind": "scaling", "settings": {"batch_size": batch}, "environment": {}, "rows": [row]}

    runs = [run(224, 32), run(512, 16), run(224, 4), run(768, 1, "convnext_tiny")]
    joined = plots._join_sizes(runs)
    assert [[row["height"] for row in rows] for rows in joined] == [[224, 512], [224], [768]]


def test_rivals_are_timed_and_drawn_beside_models_with_options(tmp_path):
    models, path = ["cswin_tiny_elfatt", "cswin_nano_elfatt:levels=EEEE"], tmp_path / "m.json"
    argv = ["scaling", "--models", *models, "--rivals", "--sizes", "32", "--attention", "fa", "--results", str(path)]
    assert main([*argv, *FAST]) == 0
    rows = rows_of(path)
    assert [row["model"] for row in rows] == [*models, *RIVALS] and all(row["images_per_s"] > 0 for row in rows)
    assert [published_top1(model) for model in models] == [83.1, None]
    assert main(["plot", str(path)]) == 0
    assert is_drawn(tmp_path / "m-rivals-1.png")


def test_rivals_come_with_the_linear_model(tmp_path):
    argv = ["scaling", "--rivals", "--count-only", "--sizes", "64", "--attention", "fa", "--device", "cpu"]
    assert main([*argv, "--results", str(tmp_path / "m.json")]) == 0
    assert [row["model"] for row in rows_of(tmp_path / "m.json")] == [*scaling.AGAINST_RIVALS, *RIVALS]


def test_tensorrt_is_timed_by_trtexec(tmp_path, monkeypatch):
    program = tmp_path / "trtexec"
    program.write_text(
        "#!/bin/bash\necho '[I] GPU Compute Time: min = 1 ms, max = 3 ms, mean = 2.2 ms, median = 2.5 ms'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert runtimes.engine_seconds(tmp_path / "m.engine", (1, 3, 64, 64)) == 2.5e-3


def test_options_of_a_model_reach_it():
    name, options = scaling.parse_model("cswin_nano_elfatt:levels=EEEE:block_size=7")
    assert (name, options) == ("cswin_nano_elfatt", {"levels": "EEEE", "block_size": 7})
    attention = [m for m in timm.create_model(name, **options).modules() if isinstance(m, ELFATT)]
    assert len(attention) == 5 and {m.block_size for m in attention} == {7}


def test_scaling_runs_training_as_well(tmp_path):
    argv = ["scaling", "--models", "cswin_nano_elfatt", "--sizes", "64", "--attention", "fa", *FAST, "--repeats", "5"]
    for number, extra in enumerate(([], ["--backward"])):
        assert main([*argv, *extra, "--results", str(tmp_path / f"{number}.json")]) == 0
    forward, training = (rows_of(tmp_path / f"{number}.json")[0] for number in (0, 1))
    assert training["counted_memory_mib"] > 3 * forward["counted_memory_mib"]


def test_scaling_measures_the_gain_over_plain_pytorch(tmp_path, monkeypatch):
    calls = []
    real = PlainBackend.elfatt_attention

    def spy(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(PlainBackend, "elfatt_attention", spy)
    argv = ["scaling", "--models", "cswin_nano_elfatt", "--sizes", "48x80", "--attention", "fa", "plain", *FAST]
    assert main([*argv, "--results", str(tmp_path / "r.json")]) == 0
    fused, unoptimised = rows_of(tmp_path / "r.json")
    assert calls
    assert fused["over_plain"] == fused["images_per_s"] / unoptimised["images_per_s"]
    assert unoptimised["over_plain"] == 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["scaling", "--models", "cswin_nano_elfatt", "--sizes", "32"], {"math", "sdpa", "reference"}),
        (["tables", "1", "--rows", "CSWin-T24181-ELFATT", "--measure", "speed"], {"math", "sdpa", "reference"}),
        (["edge", "9", "--rows", "*-ELFATT"], {"sdpa", "reference"}),  # no column of open softmax attention
    ],
    ids=["scaling", "tables", "edge"],
)
def test_the_backend_is_run_and_recorded(tmp_path, quick_numerics, backends_run, command, expected):
    fast = [*(FAST if command[0] != "edge" else FAST[:-2]), "--repeats", "1", "--batch-size", "1"]
    argv = [*command, *fast, "--results", str(tmp_path / "m.json")]
    assert main([*argv, "--backend", "sdpa"]) == 0
    assert backends_run == expected  # the reference is what outputs are compared with
    assert main([*argv, "--backend", "auto"]) == 0
    flags = [run["environment"]["flags"]["backend"] for run in load_runs(tmp_path / "m.json")]
    assert flags == ["sdpa", "auto"]  # neither replaces the other


def test_the_environment_names_the_backend_of_an_analysis(tmp_path):
    argv = ["scaling", "--models", "cswin_nano_elfatt", "--sizes", "32", "--count-only"]
    command = [sys.executable, "-m", "elfatt.analysis", *argv, "--results", str(tmp_path / "m.json")]
    environment = {**os.environ, "ELFATT_BACKEND": "math"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (run,) = load_runs(tmp_path / "m.json")
    assert run["environment"]["flags"]["backend"] == "math"


def test_a_backend_that_cannot_run_takes_one_line(capsys, monkeypatch):
    monkeypatch.setattr("elfatt.ops.pytorch._has_flash_attn", lambda: False)
    for command in (["tables", "1"], ["scaling"], ["edge", "9"]):
        assert main([*command, "--device", "cpu", "--backend", "flash_attn"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m elfatt.analysis: error: backend 'flash_attn' cannot run: it is not installed")
        with pytest.raises(SystemExit):
            main([*command, "--backend", "fast"])
        assert "argument --backend: invalid choice: 'fast'" in capsys.readouterr().err.splitlines()[-1]


def test_op_has_plain_pytorch_once(capsys):
    with pytest.raises(SystemExit):
        main(["op", "--backends", "plain"])
    assert "argument --backends: invalid choice: 'plain'" in capsys.readouterr().err.splitlines()[-1]


def test_counted_memory_is_quadratic_for_vanilla_attention_and_linear_for_elfatt(tmp_path):
    argv = ["scaling", "--count-only", "--models", "cswin_tiny_global", "cswin_tiny_elfatt", "--sizes", "256", "1024"]
    assert main([*argv, "--device", "cpu", "--results", str(tmp_path / "m.json")]) == 0
    found = {(r["model"], r["attention"], r["height"]): r["counted_memory_mib"] for r in rows_of(tmp_path / "m.json")}
    growth = {key[:2]: found[*key[:2], 1024] / found[*key[:2], 256] for key in found}
    assert growth["cswin_tiny_global", "nfa"] == pytest.approx(16**2, rel=0.05)
    assert growth["cswin_tiny_elfatt", "fa"] == pytest.approx(16, rel=0.05)


def test_edge_steps_through_numbers_of_threads(tmp_path, capsys, quick_numerics):
    argv = ["edge", "9", "--rows", "*-ELFATT", "*-GLOBAL", "--thread-modes", "1", "--results", str(tmp_path / "m.json")]
    assert main([*argv, *FAST[:-2], "--repeats", "1"]) == 0
    (run,) = load_runs(tmp_path / "m.json")
    assert run["settings"]["table"] == 9 and "precision" not in run["settings"]
    assert "threads" not in run["environment"]["hardware"]
    rows = run["rows"]
    assert [(row["name"], row["mode"], row["watts"]) for row in rows] == [
        ("CSWin-T24181-ELFATT", "1 threads", None),
        ("CSWin-T24181-GLOBAL", "1 threads", None),
    ]
    assert all(row["images_per_s_fp32"] > 0 and row["images_per_s_amp"] > 0 for row in rows)
    assert main(["plot", str(tmp_path / "m.json")]) == 0
    assert is_drawn(capsys.readouterr().out.splitlines()[-1])


def test_power_is_read_from_tegrastats():
    orin = "RAM 1/2MB CPU [1%@729] VDD_GPU_SOC 2408mW/2408mW VDD_CPU_CV 803mW/803mW VIN_SYS_5V0 3217mW/3000mW"
    nano = "RAM 1/2MB POM_5V_IN 2135/2100 POM_5V_GPU 40/40 POM_5V_CPU 285/285"
    assert edge.mean_watts([orin]) == pytest.approx(6.428)
    assert edge.mean_watts([nano, nano.replace("2135", "4135"), "RAM 1/2MB"]) == pytest.approx(3.135)
    assert edge.mean_watts(["RAM 1/2MB"]) is None and edge.mean_watts([]) is None


def test_jetson_modes_are_set_and_power_is_logged(tmp_path, monkeypatch):
    """Stand-ins for nvpmodel, sudo and tegrastats."""
    mode = tmp_path / "mode"
    scripts = {
        "sudo": 'exec "$@"',
        "nvpmodel": f'if [ "$1" = -m ]; then echo $2 > {mode}; else echo "NV Power Mode: MODE_$(cat {mode})"; fi',
        # 300 kB, more than a pipe holds, before the power rises
        "tegrastats": f"""for _ in $(seq 1000); do echo "VDD_IN 1mW/1mW {"x" * 300}"; done
while true; do echo "VDD_IN 9000mW/9000mW"; sleep 0.001; done""",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def measure(entries, args, watch):
        with watch():
            time.sleep(2)
        for entry in entries:
            entry.values["images_per_s_fp32"] = 1.0
        yield entries

    monkeypatch.setattr(edge, "measure_speed", measure)
    argv = ["edge", "8", "--rows", "*-ELFATT", "--modes", "0", "2", "--device", "cpu"]
    assert main([*argv, "--results", str(tmp_path / "m.json")]) == 0
    rows = rows_of(tmp_path / "m.json")
    assert [row["mode"] for row in rows] == ["MODE_0", "MODE_2"] and all(0.5 < row["watts"] < 9 for row in rows)


@pytest.mark.parametrize("backward", [False, True])
def test_op_compares_backends_with_plain_pytorch(tmp_path, backward, capsys):
    argv = ["op", "--shapes", "224 level 3", "--batch-size", "1", "--repeats", "2", "--device", "cpu"]
    argv += ["--backends", "math", "--results", str(tmp_path / "m.json")] + ["--backward"] * backward
    assert main(argv) == 0
    plain, math = rows_of(tmp_path / "m.json")
    assert plain["speedup"] == 1 and math["speedup"] == pytest.approx(plain["microseconds"] / math["microseconds"])
    assert plain["fused_bytes"] == (25 if backward else 9) * 14 * 14 * 128 * 4
    assert "| 224 level 3 | math |" in capsys.readouterr().out


def test_op_times_nothing_that_is_wrong(tmp_path, monkeypatch, capsys):
    from elfatt.analysis import op

    real = op.elfatt_attention

    def wrong_under(*names):
        def attention(*args, **options):
            return real(*args, **options) * (1.001 if active_backend() in names else 1)

        monkeypatch.setattr(op, "elfatt_attention", attention)

    argv = ["op", "--shapes", "224 level 3", "--batch-size", "1", "--repeats", "1", "--device", "cpu"]
    argv += ["--backends", "auto", "math", "--results", str(tmp_path / "m.json")]
    wrong_under("auto", "math")
    assert main(argv) == 1
    assert not (tmp_path / "m.json").exists()
    wrong_under("auto")
    assert main(argv) == 0
    assert "output of auto at 224 level 3 is off by 1.0e-03 in float32" in capsys.readouterr().err
    assert [row["variant"] for row in rows_of(tmp_path / "m.json")] == ["plain", "math"]


def test_report_holds_every_run_with_its_environment(tmp_path):
    results, models = tmp_path / "results", ["cswin_nano_elfatt"]
    file = results / "machine-x.json"
    assert main(["scaling", "--models", *models, "--sizes", "32", "--count-only", "--results", str(file)]) == 0
    assert main(["tables", "2", "--rows", "blocks 49-49-49-49", "--results", str(file)]) == 0
    assert main(["report", "--results", str(results), "--output", str(tmp_path / "docs" / "results.md")]) == 0
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "## machine-x" in text and "Run 1: scaling" in text and "Run 2: tables" in text and "timm " in text
    assert "| blocks 49-49-49-49 | 20 | 20 | 4.37 | 4.37 | 4.13 | 4.13 | 4.37 | 2619 | 2805 | 82.5 |" in text


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    files = sorted((ROOT / "results").glob("*.json"))
    assert (ROOT / "docs" / "results.md").read_text() == report.write_report(files)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "default" in capsys.readouterr().out


def test_the_package_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "elfatt.analysis", "tables", "99"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("Intel(R) Core(TM) i7 CPU", "intel-core-i7"),
    ],
)
def test_a_machine_has_a_short_name(cpu, name, monkeypatch):
    monkeypatch.setattr(environment, "_cpu_name", lambda: cpu)
    assert environment.machine_name("cpu") == name
