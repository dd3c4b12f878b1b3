"""``python -m elfatt.analysis runtimes``; beside the export tests, which load the same native runtimes."""

import pytest
import torch

from elfatt.analysis import memory, rows, runtimes, tables
from elfatt.analysis.__main__ import main
from elfatt.analysis.results import load_runs


def test_runtimes_take_turns_with_pytorch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rows.Row, "img_size", (64, 64))
    nano = {"elfatt": ("cswin_nano_elfatt", {}), "global": ("cswin_nano_elfatt", {"levels": "VVVV"})}
    monkeypatch.setattr(rows.Row, "timm_model", lambda row: nano[row.published["attention"]])
    monkeypatch.setattr(rows.Row, "config", property(lambda row: row.published["attention"]))
    path, folder = tmp_path / "m.json", tmp_path / "exports"
    argv = ["runtimes", "9", "--rows", "CSWin-T24181-ELFATT", "*-GLOBAL", "--runtimes", "eager", "kernels", "onnx"]
    argv += ["openvino", "tensorrt", "--device", "cpu", "--repeats", "2", "--warm-up", "0"]
    assert main([*argv, "--folder", str(folder), "--results", str(path)]) == 0
    found = {(row["name"], row["runtime"]): row for row in load_runs(path)[0]["rows"]}
    assert len(found) == 2 * 5 and len(list(folder.glob("*.onnx"))) == 2
    for (_, runtime), row in found.items():
        if runtime == "tensorrt":
            assert row["refused"] == "tensorrt runs on the GPU: pass --device cuda"
            continue
        vanilla = found["CSWin-T24181-GLOBAL", runtime]
        assert row["speedup"] == pytest.approx(row["images_per_s"] / vanilla["images_per_s"]) and row["batch_size"] == 1
    captured = capsys.readouterr()
    assert captured.err.count("runs on the GPU") == 1 and "| CSWin-T24181-ELFATT |" in captured.out
    assert main(["report", "--results", str(tmp_path), "--output", str(tmp_path / "r.md")]) == 0
    assert "openvino" in (tmp_path / "r.md").read_text()


def test_a_runtime_that_fails_costs_its_own_cells(monkeypatch, capsys):
    class Failure(Exception):
        """Like onnxruntime's, of no common type."""

    def prepare(model, runtime, batch, args):
        if runtime == "onnx":
            raise Failure("cannot read\nthe model")
        return lambda: None

    monkeypatch.setattr(runtimes, "prepare", prepare)
    args = tables.argparse.Namespace(device="cpu", batch_size=1, repeats=1, warm_up=0)
    broken, good = runtimes.measure(rows.select_rows([9], ["*-GLOBAL"])[:1], ["onnx", "eager"], "2 threads", args)
    assert broken["refused"] == "cannot read the model" and "images_per_s" in good
    assert capsys.readouterr().err == "onnx: cannot read the model\n"


def test_a_batch_that_memory_does_not_hold_is_halved(monkeypatch, capsys):
    (model,) = rows.select_rows([9], ["*-GLOBAL"])
    args = tables.argparse.Namespace(device="cpu", batch_size=8, repeats=1, warm_up=0)
    needed = memory.count_memory(model.build(), (1, 3, 224, 224), "math", torch.float32)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * needed)
    monkeypatch.setattr(runtimes, "prepare", lambda *args: lambda: None)
    exact, fused = runtimes.measure([model], ["onnx", "eager"], "2 threads", args)
    assert exact["batch_size"] == 2 and fused["batch_size"] == 8
    assert "halved to 2" in capsys.readouterr().err
