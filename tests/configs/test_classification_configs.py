"""Every configuration of Table I: its file, its recipe, its published accuracy, its model."""

import csv
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml

import elfatt  # noqa: F401
from classification.config import parse_args
from classification.runtime import build_model
from elfatt.analysis import rows

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "classification"
# not of Table I: the quickstart's, and Tables II to V
OTHERS = ("digits_nano", "digits_vit", "ablations")
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in OTHERS)
ABLATIONS = rows.select_rows([2, 3, 4, 5])

# batch per GPU, lr, weight decay, epochs, warm-up, min lr, drop path, EMA decay, mixup, cutmix, crop, image side
COLUMNS = ("batch_size", "lr", "weight_decay", "epochs", "warmup_epochs", "min_lr", "drop_path", "model_ema_decay")
COLUMNS += ("mixup", "cutmix", "crop_pct", "img_size")
RECIPES = {
    "tiny_224": (256, 2e-3, 0.05, 300, 20, 1e-5, 0.2, 0.99984, 0.8, 1.0, 0.9, 224),
    "base_224": (128, 1e-3, 0.1, 300, 20, 1e-5, 0.5, 0.99992, 0.8, 1.0, 0.9, 224),
    "base_384": (32, 5e-6, 1e-8, 20, 0, 5e-7, 0.7, 0.9998, 0.1, 0.1, 1.0, 384),
    "tiny_224_low_memory": (128, 1e-3, 0.05, 300, 20, 1e-5, 0.2, 0.99992, 0.8, 1.0, 0.9, 224),
}
SHARED = {
    "opt": "adamw",
    "opt_kwargs": {},  # torch's betas and eps
    "warmup_lr": 1e-6,
    "cooldown_epochs": 10,
    "clip_grad": None,
    "grad_accum_steps": 1,
    "smoothing": 0.1,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "scale": [0.08, 1.0],
    "ratio": pytest.approx([3 / 4, 4 / 3]),
    "hflip": 0.5,
    "train_interpolation": "random",
    "interpolation": "bicubic",
    "amp": True,
    "amp_dtype": "float16",
    "channels_last": True,
    "model_ema": True,
    "checkpoint_hist": 10,
}


def published() -> dict[str, str]:
    """Top-1 accuracy of each row of Table I by the name of its config."""
    table = {}
    with (ROOT / "elfatt" / "analysis" / "paper" / "table1_imagenet.csv").open() as file:
        for row in csv.DictReader(file):
            name = f"{row['backbone']}_{row['attention']}" if row["attention"] else rows.OTHERS[row["model"]]
            table[f"{name}_{row['resolution']}"] = row["top1_percent"]
    return table


def options(path: Path, *extra: str) -> dict:
    return vars(parse_args(["--config", str(path), "--data-dir", "x", *extra], train=True))


def check_recipe(values: dict, recipe: str) -> None:
    assert {name: values[name] for name in COLUMNS} == dict(zip(COLUMNS, RECIPES[recipe], strict=True))
    assert {name: values[name] for name in SHARED} == SHARED
    assert values["filter_bias_and_bn"] == (recipe != "base_384")


def test_table_1_has_a_config_for_each_row():
    assert set(FILES) >= set(published())  # others are of mechanisms that were added
    assert len(published()) == 38


@pytest.mark.parametrize("name", FILES)
def test_recipe_and_header(name):
    path = FOLDER / f"{name}.yaml"
    values = options(path)
    model, _, resolution = name.rpartition("_")
    assert values["model"] == model
    check_recipe(values, f"{'base' if '_base_' in name else 'tiny'}_{resolution}")

    command, hardware, accuracy = path.read_text().splitlines()[:3]
    script, config = shlex.split(command.removeprefix("# "))[1:3]
    assert (ROOT / script).is_file() and ROOT / config == path
    assert ("finetune" in script) == (resolution == "384")
    assert hardware == "# hardware: 8 GPUs"
    assert accuracy == (f"# paper: {published()[name]} % top-1" if name in published() else "# paper: not reported")


@pytest.mark.parametrize("name", FILES)
def test_model_builds(name):
    args = parse_args(["--config", str(FOLDER / f"{name}.yaml"), "--data-dir", "x"], train=True)
    with torch.device("meta"):
        model = build_model(args, drop_path_rate=args.drop_path)
    assert model.num_classes == 1000
    assert timm.is_model(args.model)


@pytest.mark.parametrize("row", ABLATIONS, ids=lambda row: row.variant)
def test_ablation_is_the_row_of_the_table(row):
    args = parse_args([*row.config_arguments(), "--data-dir", "x"], train=True)
    check_recipe(vars(args), "tiny_224")
    assert (args.model, args.model_kwargs) == row.timm_model()
    accuracy = next(line for line in (FOLDER / "ablations.yaml").read_text().splitlines() if f" {row.variant}:" in line)
    assert accuracy.split("# ")[1].split(",")[0] == row.published["top1_percent"]


def test_ablations_are_the_rows_of_the_tables():
    variants = yaml.safe_load((FOLDER / "ablations.yaml").read_text())["variants"]
    assert list(variants) == [row.variant for row in ABLATIONS]


def test_low_memory_is_a_base_and_an_override():
    base = FOLDER / "_base_" / "tiny_224_low_memory.yaml"
    values = options(base, "--model", "cswin_tiny_elfatt")
    check_recipe(values, "tiny_224_low_memory")
    flags = next(line for line in base.read_text().splitlines() if line.startswith("# --")).removeprefix("# ")
    check_recipe(options(FOLDER / "cswin_tiny_elfatt_224.yaml", *flags.split()), "tiny_224_low_memory")
