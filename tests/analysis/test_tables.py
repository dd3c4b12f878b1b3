"""The tables' command: counts equal the printed figures, and what is measured ends up where it should."""

import csv
import json

import pytest
import torch

from elfatt.analysis import results, tables
from elfatt.analysis.__main__ import main
from elfatt.analysis.rows import select_rows
from elfatt.analysis.timing import WrongOutput

TINY = ["--device", "cpu", "--batch-size", "1", "--repeats", "2", "--warm-up", "0", "--precision", "float32"]


@pytest.mark.slow
def test_counts_equal_the_printed_figures_of_every_row(tmp_path):
    """Parameters and multiply-adds of Tables I to VII, on timm's, mmseg's and mmdet's own models."""
    path = tmp_path / "counts.csv"
    assert main(["tables", "1", "2", "3", "4", "5", "6", "7", "--output", str(path)]) == 0
    compared = 0
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            decimals = {"parameters, M": 0, "GMACs nFA": 2, "GMACs FA": 2}.get(line["quantity"])
            if decimals is not None and line["paper"]:
                assert f"{float(line['here']):.{decimals}f}" == line["paper"], line
                compared += 1
    rows = [row.published for row in select_rows([1, 2, 3, 4, 5, 6, 7])]
    assert len(rows) == 38 + 4 + 4 + 6 + 5 + 28 + 14
    assert compared == sum(bool(row[cell]) for row in rows for cell in ("params_m", "gmacs_nfa", "gmacs_fa"))


def test_true_multiply_adds_have_fused_attention_and_the_scan_in_them():
    (elfatt,), (vmamba,) = (select_rows([1], [name]) for name in ("CSWin-T24181-ELFATT", "VMamba-T"))
    found = elfatt.count()
    assert found.macs_true == found.macs_nfa
    assert f"{vmamba.count().macs_true / 1e9:.2f}" == "4.91"  # as its authors publish it, with the scan


def test_efficientvit_of_the_edge_tables_is_counted():
    for row in select_rows([8, 9], ["EfficientViT-B2"]):
        found = row.count()
        assert (f"{found.params / 1e6:.1f}", f"{found.macs_nfa / 1e9:.2f}") == ("24.3", "1.60")
        assert found.macs_true == found.macs_fa == found.macs_nfa


def test_speed_lands_in_the_results_and_beside_the_paper(tmp_path, quick_numerics, capsys):
    path = tmp_path / "machine.json"
    rows = ["CSWin-T24181-ELFATT", "CSWin-T24181-GLOBAL"]
    argv = ["tables", "1", "--rows", *rows, "--measure", "speed", "--results", str(path), *TINY]
    assert main(argv) == 0
    assert main(argv) == 0  # again: the same run, not another
    (run,) = json.loads(path.read_text())["runs"]
    assert run["settings"]["precision"] == "float32" and run["environment"]["hardware"]["memory_gib"] > 0
    assert torch.__version__.startswith(run["environment"]["versions"]["torch"])
    elfatt, vanilla = run["rows"]
    for row in (elfatt, vanilla):
        for kind in ("nfa", "fa"):
            assert row[f"images_per_s_{kind}"] == pytest.approx(1e3 / row[f"latency_ms_{kind}"])
            low, high = row[f"images_per_s_{kind}_quartiles"]
            assert low <= row[f"images_per_s_{kind}"] <= high
            assert row[f"speedup_{kind}"] == row[f"images_per_s_{kind}"] / vanilla[f"images_per_s_{kind}"]
    out = capsys.readouterr().out
    assert "| CSWin-T24181-ELFATT 224 |" in out and "images/s nFA (paper)" in out and "images/s nFA (here)" in out
    assert "| 2.00 |" in out  # the paper's speed-up over vanilla attention, 2603 / 1303, beside ours


@pytest.mark.parametrize("precision", ["bfloat16", "amp"])
def test_speed_in_half_precision(tmp_path, quick_numerics, precision):
    argv = ["tables", "1", "--rows", "CSWin-T24181-LOCAL", "--measure", "speed", "--results", str(tmp_path / "m.json")]
    assert main([*argv, *TINY[:-1], precision, "--repeats", "1"]) == 0
    (row,) = json.loads((tmp_path / "m.json").read_text())["runs"][0]["rows"]
    assert row["images_per_s_nfa"] > 0 and row["images_per_s_fa"] > 0 and "speedup_fa" not in row


def test_what_is_measured_anew_leaves_nothing_old_behind(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    head = {"kind": "tables", "settings": {}, "environment": {"hardware": {}, "versions": {"elfatt": "1"}}}
    old = {"table": 1, "name": "a", "params": 1, "images_per_s_fa": 50, "speedup_fa": 2}
    results.save_rows(path, head, [old], tables.KEY, tables.FIELDS["speed"])
    new = {"table": 1, "name": "a", "refused_fa": "off"}
    results.save_rows(path, head, [new], tables.KEY, tables.FIELDS["speed"])
    assert results.load_runs(path)[0]["rows"] == [{"table": 1, "name": "a", "params": 1, "refused_fa": "off"}]
    newer = {**head, "environment": {"hardware": {}, "versions": {"elfatt": "2"}}}
    results.save_rows(path, newer, [new], tables.KEY)
    assert [run["environment"]["versions"]["elfatt"] for run in results.load_runs(path)] == ["2"]


def test_speed_ups_are_between_equal_batches(monkeypatch):
    entries = [tables.Entry(row) for row in select_rows([1], ["CSWin-T24181-ELFATT", "CSWin-T24181-GLOBAL"])]
    for entry, batch in zip(entries, (4, 1), strict=True):
        entry.values |= {
            "batch_size_fa": batch,
            "images_per_s_fa": 2.0 * batch,
            "batch_size_nfa": 1,
            "images_per_s_nfa": batch,
        }
    tables._compare(entries, None)
    assert "speedup_fa" not in entries[0].values and entries[0].values["speedup_nfa"] == 4
    tables._compare(entries, "*-ELFATT 224")
    assert entries[1].values["speedup_nfa"] == 0.25 and entries[1].values["speedup_over"] == "CSWin-T24181-ELFATT 224"


@pytest.mark.slow
def test_peak_memory_is_that_of_the_attention_maps(tmp_path):
    argv = [
        "tables",
        "1",
        "--rows",
        "CSWin-T24181-GLOBAL",
        "--measure",
        "memory",
        "--results",
        str(tmp_path / "m.json"),
    ]
    assert main([*argv, *TINY]) == 0
    (row,) = json.loads((tmp_path / "m.json").read_text())["runs"][0]["rows"]
    # those of level 1 are 2 heads × 3136² floats: in the open they are there, fused they are not
    assert row["peak_memory_mib_nfa"] > row["peak_memory_mib_fa"] + 2 * 3136**2 * 4 / 2**20


def test_edge_tables_have_a_column_for_each_precision():
    (row,) = select_rows([9], ["*-ELFATT"])
    args = tables.argparse.Namespace(device="cpu", compile=False, cuda_graphs=False, precision="float32")
    assert {kind: how.precision for kind, how in tables.variants(row, args).items()} == {
        "fp32": "float32",
        "amp": "amp",
    }
    assert row.img_size == (224, 224) and row.batch_size == 1


def test_a_wrong_model_has_no_speed(tmp_path, monkeypatch, capsys):
    def refuse(name, *_):
        raise WrongOutput(f"{name} is off")

    monkeypatch.setattr(tables, "check_numerics", refuse)
    argv = ["tables", "1", "--rows", "CSWin-T24181-ELFATT", "--measure", "speed", "--results", str(tmp_path / "m.json")]
    assert main([*argv, *TINY]) == 0
    (row,) = json.loads((tmp_path / "m.json").read_text())["runs"][0]["rows"]
    assert not any(key.startswith("images_per_s") for key in row) and "is off" in row["refused_fa"]
    assert "not timed" in capsys.readouterr().err


def test_what_does_not_fit_says_what_it_needs(tmp_path, monkeypatch, capsys):
    from elfatt.analysis import memory

    monkeypatch.setattr(memory, "available_bytes", lambda device: 100 * 2**20)
    argv = [
        "tables",
        "1",
        "--rows",
        "CSWin-T24181-GLOBAL",
        "--measure",
        "memory",
        "--results",
        str(tmp_path / "m.json"),
    ]
    assert main([*argv, *TINY, "--batch-size", "64"]) == 0
    error = capsys.readouterr().err
    assert "GLOBAL 224 with the math backend needs about 0.2 GiB for one image of 224x224, 0.1 GiB are free" in error
    (row,) = json.loads((tmp_path / "m.json").read_text())["runs"][0]["rows"]
    assert row["memory_batch_size_fa"] == 8  # 9.2 MiB an image: halved from 64
    assert "peak_memory_mib_nfa" not in row


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tables", "12"], "there is no table 12: choose 1 to 9"),
        (["tables", "1", "--rows", "cswin-t24181-elfat"], "did you mean 'CSWin-T24181-ELFATT'?"),
        (["tables", "1", "--output", "x.txt"], "must end in .md or .csv"),
        (["tables", "1", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["tables", "1", "--measure", "accuracy"], "accuracy needs checkpoints"),
        (["tables", "1", "--warm-up", "-5"], "--warm-up must be at least 0, got -5"),
        (["tables", "1", "--measure", "speed", "--device", "cpu", "--cuda-graphs"], "CUDA graphs need a GPU"),
        (["op", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["scaling", "--plot", "x.xyz"], "--plot x.xyz must end in .png, .svg or .pdf"),
        (["scaling", "--models", "cswin_tiny_elfat"], "did you mean 'cswin_tiny_elfatt'?"),
        (["scaling", "--models", "cswin_nano_elfatt:levels"], "must be NAME:KEY=VALUE"),
        (["scaling", "--sizes", "224x"], "size '224x' must be a side or HEIGHTxWIDTH"),
        (["edge", "9", "--modes", "0"], "needs a Jetson's nvpmodel"),
        (["plot", "nowhere.json"], "nowhere.json has nothing to plot"),
        (["report", "--results", "nowhere"], "nowhere contains no results file"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m elfatt.analysis: error: ") and message in error
