"""A run becomes a folder that timm loads, and a card of its own figures."""

import csv
import json

import pytest
import timm
import torch

from classification import publish, train


@pytest.fixture
def finished(options, tmp_path):
    assert train.main(options("--model-ema", "--model-ema-decay", 0.5, "--model-kwargs", "block_size=4")) == 0
    return tmp_path / "run"


def best(folder, column):
    with (folder / "summary.csv").open(newline="") as file:
        return max(float(row[column]) for row in csv.DictReader(file))


def test_a_run_is_published_with_its_best_averaged_weights(finished, tmp_path, capsys):
    assert publish.main([str(finished), "--output", str(tmp_path / "out"), "--license", "mit"]) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    wanted = torch.load(finished / "model_best.pth.tar", weights_only=True)["state_dict_ema"]
    found = model.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == ["cat", "dog", "fish"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Top-1 accuracy | {best(finished, 'eval_ema_top1'):.3f} % |" in card
    assert "| Weights | averaged (EMA) |" in card and "block_size" in card and "license: mit" in card


def test_the_results_of_an_evaluation_stand_in_the_card(finished, tmp_path):
    results = tmp_path / "scores.json"
    results.write_text(json.dumps({"top1": 12.5, "top5": 50.0, "images": 8}))
    model, options = publish.read_run(finished, results)
    text = options["card"].render("name", "hf-hub:me/name")
    assert "| Evaluated on | 8 images |" in text and "| Top-1 accuracy | 12.500 % |" in text
    assert model.num_classes == 3


def test_a_run_is_pushed(finished, monkeypatch, capsys):
    def push(model, repo_id, *, private, **options):
        assert repo_id == "me/digits" and private and options["label_names"] == ["cat", "dog", "fish"]
        return "https://example.org"

    monkeypatch.setattr(publish, "push_to_hub", push)
    assert publish.main([str(finished), "--push", "me/digits", "--private"]) == 0
    assert "https://example.org" in capsys.readouterr().out


def test_mistakes_end_in_one_line(tmp_path, capsys, finished):
    def error(*argv):
        assert publish.main([str(item) for item in argv]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    (tmp_path / "no.json").write_text("[]")
    assert "args.yaml is missing: pass the folder of a run" in error(tmp_path / "empty", "--output", tmp_path / "out")
    assert "nothing to do: pass --output" in error(finished)
    assert "is not an empty folder: choose another" in error(finished, "--output", finished)
    assert "no.json is not the .json of validate.py" in error(
        finished, "--output", tmp_path / "out", "--results", tmp_path / "no.json"
    )
    (finished / "summary.csv").write_text("epoch,train_loss\n0,1\n")
    assert "has no eval_ema_top1 of epoch" in error(finished, "--output", tmp_path / "out")
