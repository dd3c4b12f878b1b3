"""Evaluation counts each image once, on one process or several, and says whose weights it used."""

import csv
import json
import logging
import shutil
import subprocess

import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms.functional import center_crop, normalize, to_tensor

from classification.checkpoint import load
from classification.config import parse_args
from classification.data import _transform
from classification.evaluate import evaluate
from classification.runtime import World
from classification.train import main as train
from classification.validate import evaluation_config, main, run
from elfatt.checkpoints import LoadReport
from elfatt.checkpoints.__main__ import main as convert
from elfatt.checkpoints.names import NAMINGS
from elfatt.data import UserError
from tests.checkpoints.official import drawn, plan, swin_shapes

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
    line = fails(main, [*arguments, "--results-file", str(table / "x.json")])
    assert "all.csv (" in line and "pass another --results-file" in line
    other = tmp_path / "instances.json"
    for text in ('{"images": []}', "[1]", "{"):
        other.write_text(text)
        line = fails(main, [*arguments, "--results-file", str(other)])
        assert "instances.json has other columns" in line and other.read_text() == text


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
    assert "folders and classes differ: 1 missing ('cat')" in capsys.readouterr().out
    whole = run([*arguments, "--data-dir", str(data_dir)])
    for split in ("dog", "fish"):
        shutil.rmtree(copy / "val" / split)
    shutil.copytree(data_dir / "val" / "cat", copy / "val" / "cat")
    cats = run(arguments)
    assert cats["loss"] * 5 + part["loss"] * 10 == pytest.approx(whole["loss"] * 15)
    (copy / "val" / "cat").rename(copy / "val" / "cow")
    assert "has different classes from the checkpoint: 1 surplus ('cow')" in fails(main, arguments)
    (tmp_path / "map.txt").write_text("dog\ncat\nfish\n")
    line = fails(main, [*arguments, "--data-dir", str(data_dir), "--class-map", str(tmp_path / "map.txt")])
    assert "and the checkpoint number classes differently: 'dog' is class 0 here and class 1 there" in line


# ------------------------------------------------------------------------- the crop behind published accuracies

# width and height after resizing the image of 640 x 480, from each repository's own data code
SHORT_256, SQUARE_256 = (341, 256), (256, 256)
RESIZED = {
    ("microsoft Swin", 224): SHORT_256,
    ("microsoft Swin", 384): (384, 384),
    ("open-mmlab Swin", 224): SHORT_256,
    ("open-mmlab Swin", 384): (384, 384),
    ("microsoft CSWin", 224): (330, 248),
    ("microsoft CSWin", 384): (512, 384),
    ("FLatten-Swin", 224): SQUARE_256,
    ("FLatten-Swin", 384): (384, 384),
    ("FLatten-CSWin", 224): SQUARE_256,
    ("FLatten-CSWin", 384): (438, 438),
    ("Agent-Swin", 224): SQUARE_256,
    ("Agent-Swin", 384): (384, 384),
    ("Agent-CSWin", 224): SQUARE_256,
    ("Agent-CSWin", 384): (438, 438),
    ("VMamba", 224): SHORT_256,
    ("Facebook ConvNeXt", 224): SHORT_256,
    ("Facebook ConvNeXt", 384): (384, 384),
    ("timm Swin", 224): (330, 248),
    ("timm Swin", 384): (512, 384),
}


def pixels(argv, source, side):
    """The evaluation transform of an image with noise in every pixel."""
    argv = ["--model", "cswin_nano_elfatt", "--data-dir", "x", "--checkpoint", "y", "--img-size", str(side), *argv]
    args, report = parse_args(argv, train=False), LoadReport(source, "raw", 1, (), ())
    with torch.device("meta"):
        model = timm.create_model(args.model)
    return _transform(args, evaluation_config(argv, args, model, report), False, False)(noise())


def noise():
    values = torch.randint(0, 256, (480, 640, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def cut(size, side, resample=Image.Resampling.BICUBIC):
    image = to_tensor(center_crop(noise().resize(size, resample), [side, side]))
    return normalize(image, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_every_publication_has_its_crop():
    assert {(naming.source, side) for naming in NAMINGS for side in naming.crops} == set(RESIZED)


@pytest.mark.parametrize(("source", "side"), RESIZED)
def test_the_crop_is_the_authors(source, side, caplog):
    with caplog.at_level(logging.INFO, logger="classification"):
        assert torch.equal(pixels([], source, side), cut(RESIZED[source, side], side))
    (record,) = caplog.records
    assert f"crop of the authors of {source}: --crop-pct" in record.getMessage()


@pytest.mark.parametrize(
    ("argv", "source", "side", "size"),
    [
        (["--crop-pct", "1.0"], "microsoft Swin", 224, (298, 224)),
        (["--crop-mode", "squash"], "microsoft Swin", 224, (248, 248)),  # with the model's own 0.9
        (["--crop-mode", "squash", "--crop-pct", "1.0"], "microsoft CSWin", 384, (384, 384)),
        ([], "native", 224, (330, 248)),
        ([], "microsoft Swin", 288, (426, 320)),  # a side that was not published: the model's own
    ],
)
def test_other_crops(argv, source, side, size, caplog):
    with caplog.at_level(logging.INFO, logger="classification"):
        assert torch.equal(pixels(argv, source, side), cut(size, side))
    assert not caplog.records


def test_an_interpolation_goes_with_the_authors_crop():
    found = pixels(["--interpolation", "bilinear"], "microsoft Swin", 224)
    assert torch.equal(found, cut(SHORT_256, 224, Image.Resampling.BILINEAR))


@pytest.mark.parametrize("name", ["official.pth", "converted.pth", "converted.safetensors"])
def test_published_weights_are_evaluated_as_published(name, write_images, tmp_path, capsys):
    """The official file and what `python -m elfatt.checkpoints` makes of it, whatever the configuration says."""
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_classes": 3}
    stages = plan("swin_local", options | {"window_size": 7, "levels": "LLLL", "agents": (1,) * 4}, 224)
    torch.save(
        {"model": {key: t.float() for key, t in drawn(swin_shapes(stages, 3)).items()}}, tmp_path / "official.pth"
    )
    model = ["--model", "swin_tiny_local", "--model-kwargs", *(f"{key}={value}" for key, value in options.items())]
    if name != "official.pth":
        assert convert([str(tmp_path / "official.pth"), *model, "--output", str(tmp_path / name)]) == 0
    (tmp_path / "config.yaml").write_text("crop-pct: 1.0\n")
    data = write_images(tmp_path / "data", train=1, val=1, side=64)
    argv = ["--data-dir", str(data), "--checkpoint", str(tmp_path / name), "--config", str(tmp_path / "config.yaml")]
    argv += [*model, "--device", "cpu", "--no-amp", "--workers", "0"]
    found = run(argv)
    assert (
        "crop of the authors of microsoft Swin: --crop-pct 0.875 --crop-mode center (bicubic)"
        in capsys.readouterr().out
    )
    assert found["loss"] == run([*argv, "--crop-pct", "0.875"])["loss"]
    assert found["loss"] != run([*argv, "--crop-pct", "1.0"])["loss"]


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
