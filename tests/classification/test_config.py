"""YAML defaults, inheritance, command-line overrides, and one-line errors."""

from pathlib import Path

import pytest
import yaml

from classification.config import build_parser, load_yaml, parse_args, save_yaml
from classification.train import main as train
from classification.validate import main as validate
from elfatt.data import UserError


def write(path, **values):
    path.write_text(yaml.safe_dump({key.replace("_", "-"): value for key, value in values.items()}))
    return str(path)


def test_yaml_sets_and_the_command_line_overrides(tmp_path):
    write(
        tmp_path / "base.yaml",
        model="resnet18",
        lr="2e-3",
        epochs=7,
        amp=False,
        scale=[0.5, 1],
        opt_kwargs={"eps": 1},
        warmup_epochs=1,
    )
    config = write(tmp_path / "own.yaml", base="base.yaml", epochs=8, data_dir="x", allow_mismatch=["head."])
    argv = ["--config", config, "--epochs", "9", "--opt-kwargs", "momentum=0.5", "--amp"]
    args = parse_args(argv, train=True)
    assert (args.lr, args.epochs, args.amp, args.scale) == (2e-3, 9, True, [0.5, 1.0])
    assert args.opt_kwargs == {"eps": 1, "momentum": 0.5}
    assert args.allow_mismatch == ["head."]
    assert parse_args(["--config", config], train=True).epochs == 8  # parsing leaves nothing behind


def test_args_yaml_reads_back(tmp_path):
    args = parse_args(
        ["--model", "resnet18", "--data-dir", "x", "--clip-grad", "5", "--model-kwargs", "a=1"], train=True
    )
    save_yaml(args, tmp_path / "args.yaml")
    again = parse_args(["--config", str(tmp_path / "args.yaml")], train=True)
    assert {**vars(again), "config": None} == vars(args)


def test_validate_reads_a_training_config(tmp_path):
    config = write(tmp_path / "own.yaml", model="resnet18", lr=1, data_dir="x", crop_pct=0.9, checkpoint="y")
    args = parse_args(["--config", config, "--no-ema"], train=False)
    assert args.crop_pct == 0.9 and not args.use_ema and not hasattr(args, "lr")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup_epoch": 3}, "unknown key 'warmup-epoch'; did you mean 'warmup-epochs'?"),
        ({"lr": "high"}, "lr: 'high' is not a valid value"),
        ({"epochs": 1.5}, "epochs: 1.5 is not a valid value"),
        ({"amp": 1}, "amp: 1 is not a valid value"),
        ({"scale": 1}, "scale: 1 is not a valid value"),
        ({"amp_dtype": "fp8"}, "amp-dtype: 'fp8' is not one of float16, bfloat16"),
        ({"base": "nothing.yaml"}, "nothing.yaml does not exist (base of "),
        ({"base": "own.yaml"}, "is its own base"),
        ({"model": "cswin_tiny_elfat"}, "unknown model 'cswin_tiny_elfat'; did you mean 'cswin_tiny_elfatt'?"),
        ({"model": None}, "no model: pass --model"),
        ({"data_dir": None}, "no data: pass --data-dir"),
        ({"lr": 0}, "--lr must be in (0, inf), got 0"),
        ({"clip_grad": 0}, "--clip-grad must be in (0, inf), got 0"),
        ({"crop_pct": 1.5}, "--crop-pct must be in (0, 1], got 1.5"),
        ({"drop_path": 1}, "--drop-path must be in [0, 1), got 1"),
        ({"mixup_prob": 7}, "--mixup-prob must be in [0, 1], got 7"),
        ({"scale": [1, 0.08]}, "--scale must be two increasing positive numbers, got 1.0 0.08"),
        ({"epochs": 5, "warmup_epochs": 5}, "--warmup-epochs must be below --epochs 5, got 5"),
        ({"dataset": "wdss/x"}, "unknown reader 'wdss' in --dataset wdss/x; did you mean 'wds'?"),
        ({"workers": -1}, "--workers must be in [0, inf), got -1"),
        ({"mixup": 0.8, "batch_size": 3}, "--batch-size must be even with mixup or cutmix, got 3"),
    ],
)
def test_bad_values_are_named(tmp_path, values, message):
    config = write(tmp_path / "own.yaml", **{"model": "resnet18", "data_dir": "x", **values})
    with pytest.raises(UserError) as error:
        parse_args(["--config", config], train=True)
    assert message in str(error.value)


def test_a_config_must_be_a_mapping(tmp_path):
    for text in ("- a", "a: [", ""):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(UserError, match="own.yaml"):
            load_yaml(tmp_path / "own.yaml")


@pytest.mark.parametrize("main", [train, validate])
def test_command_line_errors_take_one_line(main, fails):
    assert fails(main, ["--imgsize", "3"]).endswith("unknown argument --imgsize; did you mean '--img-size'?")
    assert "invalid int value: 'x'" in fails(main, ["--img-size", "x"])
    assert "expected KEY=VALUE, got 'depth'" in fails(main, ["--model-kwargs", "depth"])
    assert "config file none.yaml does not exist" in fails(main, ["--config", "none.yaml"])


def test_validate_needs_weights(fails):
    line = fails(validate, ["--model", "resnet18", "--data-dir", "x"])
    assert line == "validate.py: error: no weights: pass --checkpoint FILE"
    line = fails(validate, ["--model", "resnet18", "--data-dir", "x", "--checkpoint", "y", "--results-file", "z.txt"])
    assert "--results-file must end in .json or .csv, got z.txt" in line


def test_every_option_is_read_somewhere():
    """No dead options: each name occurs in the code beyond the table that defines it."""
    folder = Path(__file__).resolve().parents[2] / "classification"
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "config.py")
    for training in (True, False):
        for action in build_parser(training)._actions:
            assert action.dest in ("help", "config") or f"args.{action.dest}" in code or f'"{action.dest}"' in code


def test_variants_are_chosen_by_name(tmp_path):
    config = write(tmp_path / "own.yaml", model="resnet18", lr=1, data_dir="x", variants={"a": {}, "b-c": {"lr": 2}})
    assert parse_args(["--config", config, "--variant", "a"], train=True).lr == 1
    args = parse_args(["--config", config, "--variant", "b-c"], train=True)
    assert args.lr == 2
    assert parse_args(["--config", config, "--variant", "b-c", "--lr", "3"], train=True).lr == 3
    save_yaml(args, tmp_path / "args.yaml")
    assert parse_args(["--config", str(tmp_path / "args.yaml")], train=True).lr == 2
    with pytest.raises(UserError, match="has no variant 'b-d'; did you mean 'b-c'?"):
        parse_args(["--config", config, "--variant", "b-d"], train=True)
    with pytest.raises(UserError, match="needs --variant, one of a, b-c"):
        parse_args(["--config", config], train=True)
    plain = write(tmp_path / "plain.yaml", model="resnet18", data_dir="x")
    with pytest.raises(UserError, match="has no variants: omit --variant a"):
        parse_args(["--config", plain, "--variant", "a"], train=True)
    with pytest.raises(UserError, match="--variant a needs a --config"):
        parse_args(["--model", "resnet18", "--data-dir", "x", "--variant", "a"], train=True)
