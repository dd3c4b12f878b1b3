"""Evaluation counts each image once, on one process or several, and says whose weights it used."""

import csv
import json
import shutil
import subprocess

import pytest
import torch
from torch import nn

from classification.checkpoint import load
from classification.config import UserError
from classification.evaluate import evaluate
from classification.runtime import World
from classification.train import main as train
from classification.validate import main, run

CPU = torch.device("cpu")
NO_AMP = torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def checkpoint(data_dir, tmp_path_factory):
    """One epoch's checkpoint whose averaged weights are those of the beginning, more or less."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained")
    argv = ["--data-dir", data_dir, "--model", "cswin_nano_elfatt", "--num-classes", 3, "--img-size", 32, "--epochs", 2]
    argv += ["--batch-size", 8, "--workers", 0, "--device", "cpu", "--no-amp", "--warmup-epochs", 0, "--output", out]
    argv += ["--cooldown-epochs", 0, "--model-ema", "--experiment", "run"]
    assert train([str(item) for item in argv]) == 0
    return out / "run" / "last.pth.tar"


@pytest.fixture
def arguments(data_dir, checkpoint):
    values = ["--data-dir", data_dir, "--model", "cswin_nano_elfatt", "--num-classes", 3, "--img-size", 32]
    values += ["--batch-size", 4, "--workers", 0, "--device", "cpu", "--no-amp", "--checkpoint", checkpoint]
    return [str(item) for item in values]


def test_sums_are_those_of_the_definition():
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(11) % 7
    batches = [(logits[start : start + 4], labels[start : start + 4]) for start in (0, 4, 8)]
    scores = evaluate(nn.Identity(), batches, World(CPU), NO_AMP)
    order = logits.argsort(dim=1, descending=True)
    assert scores["images"] == 11
    assert scores["top1"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert scores["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert scores["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    with pytest.raises(UserError, match="no image"):
        evaluate(nn.Identity(), [], World(CPU), NO_AMP)


def test_it_repeats_what_training_found_and_names_the_weights(arguments, checkpoint, tmp_path, capsys):
    header, *rows = list(csv.reader((checkpoint.parent / "summary.csv").open()))
    last = dict(zip(header, map(float, rows[-1]), strict=True))
    for extra, name, words in (([], "ema", "averaged (EMA) weights of"), (["--no-ema"], "raw", "raw weights of")):
        results = tmp_path / f"{name}.json"
        assert main([*arguments, *extra, "--results-file", str(results)]) == 0
        assert f"cswin_nano_elfatt, {words} {checkpoint}:" in capsys.readouterr().out
        scores = json.loads(results.read_text())
        assert scores["weights"] == name and scores["images"] == 15
        for key in ("top1", "top5", "loss"):
            assert scores[key] == pytest.approx(last[f"eval_{name}_{key}"], rel=1e-5)


def test_results_are_appended_to_a_table(arguments, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "all.csv").touch()
    for _ in range(2):
        assert main([*arguments, "--results-file", str(tmp_path / "new" / "all.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "new" / "all.csv").open()))
    assert len(rows) == 2 and rows[0]["top1"] == rows[1]["top1"] and rows[0]["images"] == "15"


def test_a_table_of_other_columns_is_left_alone(arguments, tmp_path, fails):
    table = tmp_path / "all.csv"
    table.write_text("model,top1\n")
    line = fails(main, [*arguments, "--results-file", str(table)])
    assert "all.csv has other columns than model, checkpoint, weights, backend, top1" in line
    assert table.read_text() == "model,top1\n"


def test_the_backend_is_run_and_recorded(arguments, tmp_path, backends_run, fails):
    path = tmp_path / "results.json"
    assert main([*arguments, "--backend", "math", "--results-file", str(path)]) == 0
    assert backends_run == {"math"} and json.loads(path.read_text())["backend"] == "math"
    assert "invalid choice: 'fast'" in fails(main, [*arguments, "--backend", "fast"])


@pytest.mark.parametrize("extra", [["--amp", "--amp-dtype", "bfloat16", "--channels-last"], ["--crop-pct", "1.0"]])
def test_every_mode_evaluates(arguments, extra):
    assert run([*arguments, *extra])["images"] == 15


def test_a_run_folder_s_args_yaml_is_a_config(checkpoint, capsys):
    argv = ["--config", str(checkpoint.parent / "args.yaml"), "--checkpoint", str(checkpoint)]
    assert main(argv) == 0
    assert "15 images" in capsys.readouterr().out


def test_a_raw_file_is_evaluated_as_such(arguments, checkpoint, tmp_path):
    torch.save(load(checkpoint)["state_dict"], tmp_path / "raw.pth")
    assert run([*arguments, "--checkpoint", str(tmp_path / "raw.pth")])["weights"] == "raw"


def test_a_checkpoint_that_does_not_fit(arguments, tmp_path, fails):
    assert "none.pth does not exist" in fails(main, [*arguments, "--checkpoint", str(tmp_path / "none.pth")])
    line = fails(main, [*arguments, "--model", "resnet18"])
    assert "last.pth.tar is a checkpoint of cswin_nano_elfatt, not of resnet18" in line
    (tmp_path / "half.pth").write_bytes(b"PK")
    assert "half.pth" in fails(main, [*arguments, "--checkpoint", str(tmp_path / "half.pth")])


def test_labels_are_compared_by_name(arguments, data_dir, tmp_path, fails, capsys):
    assert load(arguments[-1])["class_to_idx"] == {"cat": 0, "dog": 1, "fish": 2}
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    shutil.rmtree(copy / "val" / "cat")
    arguments = [*arguments, "--data-dir", str(copy)]
    part = run(arguments)  # the folders that are left keep the labels of training: nothing is shifted
    assert "has only some of the classes: 1 missing ('cat')" in capsys.readouterr().out
    whole = run([*arguments, "--data-dir", str(data_dir)])
    for split in ("dog", "fish"):
        shutil.rmtree(copy / "val" / split)
    shutil.copytree(data_dir / "val" / "cat", copy / "val" / "cat")
    cats = run(arguments)
    assert cats["loss"] * 5 + part["loss"] * 10 == pytest.approx(whole["loss"] * 15)
    (copy / "val" / "cat").rename(copy / "val" / "cow")
    assert "has other classes than the checkpoint: 1 surplus ('cow')" in fails(main, arguments)
    (tmp_path / "map.txt").write_text("dog\ncat\nfish\n")
    line = fails(main, [*arguments, "--data-dir", str(data_dir), "--class-map", str(tmp_path / "map.txt")])
    assert "has other classes than the checkpoint: 'dog' is class 0 here and class 1 there" in line


@pytest.mark.slow
def test_two_processes_count_fifteen_images(arguments, command, data_dir, checkpoint, tmp_path):
    alone = run(arguments)
    (tmp_path / "config.yaml").write_text("model: cswin_nano_elfatt\n")
    script = command("scripts/evaluate_imagenet.sh", "config.yaml", data_dir, checkpoint, *arguments, NGPUS="2")
    script["args"] += ["--results-file", "two.json"]
    subprocess.run(**script | {"cwd": tmp_path}, check=True, capture_output=True)
    both = json.loads((tmp_path / "two.json").read_text())
    assert both["images"] == 15
    for key in ("top1", "top5", "loss"):
        assert both[key] == pytest.approx(alone[key], rel=1e-6)
