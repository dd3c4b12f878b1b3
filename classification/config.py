"""Options of ``train.py`` and ``validate.py``, set by a YAML file and overridden on the command line.

YAML keys are option names without the leading dashes (``batch-size: 256``). ``base: file.yaml``, relative to the file,
is read first and overridden by the file's own keys. ``variants:`` maps names to further keys; ``--variant`` selects
one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import yaml

from elfatt.data import UserError
from elfatt.keywords import Keywords
from elfatt.ops import BACKENDS, active_backend
from elfatt.suggest import did_you_mean

READERS = ("", "wds", "hfds", "hfids", "tfds", "torch")  # '' is a folder or tar files
CROP_MODES = ("center", "squash", "border")  # timm's
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# lower bound, upper bound, and brackets as in [0, 1)
RANGES = {
    **dict.fromkeys(
        ("batch_size", "epochs", "grad_accum_steps", "checkpoint_hist", "log_interval"), (1, math.inf, "[)")
    ),
    **dict.fromkeys(("workers", "max_broken_images", "recovery_interval"), (0, math.inf, "[)")),
    **dict.fromkeys(("warmup_epochs", "cooldown_epochs", "mixup", "cutmix", "color_jitter"), (0, math.inf, "[)")),
    **dict.fromkeys(("weight_decay", "min_lr", "warmup_lr"), (0, math.inf, "[)")),
    **dict.fromkeys(("lr", "clip_grad"), (0, math.inf, "()")),
    **dict.fromkeys(("drop_path", "smoothing", "model_ema_decay"), (0, 1, "[)")),
    **dict.fromkeys(("mixup_prob", "mixup_switch_prob", "reprob", "hflip"), (0, 1, "[]")),
    "crop_pct": (0, 1, "(]"),
    "img_size": (4, math.inf, "[)"),
    "seed": (0, 2**32, "[)"),
}
NO_FOLDER_PREFIXES = ("hfds", "hfids", "tfds", "torch")  # readers that find or download the data themselves


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # one line, no usage dump
        self.exit(2, f"{self.prog}: error: {message}\n")


SWITCH = argparse.BooleanOptionalAction


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", help="dataset root, see docs/data.md")
    add(
        "--dataset",
        default="",
        help="timm reader: '' for a folder or tar file, or wds/, hfds/, hfids/, tfds/, torch/NAME",
    )
    add("--val-split", default="val", help="name of the validation split")
    add("--val-num-samples", type=int, help="number of validation images (WebDataset without _info.json)")
    add("--class-map", default="", help="text file mapping class names to indices")
    add("--dataset-download", action=SWITCH, default=False, help="download the dataset")
    add(
        "--dataset-trust-remote-code",
        action=SWITCH,
        default=False,
        help="allow a Hugging Face dataset to run its own code",
    )
    add("--input-key", help="image key or extension, if the reader has one")
    add("--target-key", help="label key, if the reader has one")
    add("--workers", type=int, default=8, help="data loading workers per process")
    add("--max-broken-images", type=int, default=0, help="unreadable images that each process may skip")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", help="timm model name, e.g. cswin_tiny_elfatt")
    add("--model-kwargs", nargs="*", default={}, action=Keywords, help="model keyword arguments, e.g. lepe=False")
    add("--plan", help="attention plan for a pretrained ViT: JSON file of classification/calibrate.py")
    add("--num-classes", type=int, help="number of classes (default: the model's)")
    add("--img-size", type=int, help="input size in pixels (default: the model's)")
    add("--crop-pct", type=float, help="evaluation crop as a share of the resized image")
    add(
        "--crop-mode",
        choices=CROP_MODES,
        help="center crops the longer side, squash changes the aspect ratio, border pads the shorter side",
    )
    add("--interpolation", default="bicubic", choices=INTERPOLATIONS, help="evaluation interpolation")


def _add_computation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("computation").add_argument
    add("--device", help="cuda or cpu (default: cuda if available)")
    add("--backend", default=active_backend(), choices=BACKENDS, help="backend of the attention operations")
    add("--batch-size", type=int, default=128, help="batch size per process")
    add("--amp", action=SWITCH, default=True, help="mixed precision")
    add("--amp-dtype", default="float16", choices=["float16", "bfloat16"], help="float16 uses loss scaling")
    add("--channels-last", action=SWITCH, default=False, help="channels-last memory format")
    add("--compile", action=SWITCH, default=False, help="torch.compile the model")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    add("--checkpoint", help="checkpoint to evaluate")
    add("--no-ema", dest="use_ema", action="store_false", default=True, help="evaluate the raw weights, not the EMA")
    add("--results-file", help="file for the results: .json is overwritten, .csv appended to")


def _add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training data and augmentation").add_argument
    add("--train-split", default="train", help="name of the training split")
    add("--train-num-samples", type=int, help="number of training images (WebDataset without _info.json)")
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area range of the random crop")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio range of the random crop")
    add("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    add("--color-jitter", type=float, default=0.4, help="colour jitter, unless --aa is given")
    add("--aa", default=None, help="AutoAugment policy, e.g. rand-m9-mstd0.5-inc1")
    add("--train-interpolation", default="random", choices=("random", *INTERPOLATIONS), help="training interpolation")
    add("--reprob", type=float, default=0.0, help="probability of random erasing")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"], help="fill of erased regions")
    add("--recount", type=int, default=1, help="maximum number of erased regions per image")
    add("--mixup", type=float, default=0.0, help="mixup alpha, 0 to disable")
    add("--cutmix", type=float, default=0.0, help="cutmix alpha, 0 to disable")
    add("--mixup-prob", type=float, default=1.0, help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix over mixup if both are enabled")
    add(
        "--mixup-mode",
        default="batch",
        choices=["batch", "pair", "elem"],
        help="draw one mixing ratio per batch, pair or element",
    )
    add("--smoothing", type=float, default=0.0, help="label smoothing")


def _add_optimization_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--opt", default="adamw", help="timm optimizer")
    add("--opt-kwargs", nargs="*", default={}, action=Keywords, help="optimizer keyword arguments, e.g. eps=1e-6")
    add("--lr", type=float, default=1e-3, help="peak learning rate, not scaled with the batch size")
    add("--weight-decay", type=float, default=0.05, help="weight decay")
    add("--filter-bias-and-bn", action=SWITCH, default=True, help="no weight decay on biases and 1-D parameters")
    add("--epochs", type=int, default=300, help="epochs of the cosine schedule, including warm-up")
    add("--warmup-epochs", type=int, default=20, help="epochs of linear warm-up")
    add("--warmup-lr", type=float, default=1e-6, help="initial learning rate of the warm-up")
    add(
        "--min-lr",
        type=float,
        default=1e-5,
        help="final learning rate of the cosine schedule, kept during cool-down",
    )
    add("--cooldown-epochs", type=int, default=10, help="epochs at --min-lr after the schedule")
    add("--grad-accum-steps", type=int, default=1, help="batches per optimizer update")
    add("--clip-grad", type=float, help="maximum gradient norm (default: no clipping)")
    add("--drop-path", type=float, help="stochastic depth rate (default: the model's)")
    add("--grad-checkpointing", action=SWITCH, default=False, help="recompute activations to save memory")
    add("--model-ema", action=SWITCH, default=False, help="keep an exponential moving average (EMA) of the weights")
    add("--model-ema-decay", type=float, default=0.9999, help="EMA decay per update")
    add("--seed", type=int, default=42, help="random seed")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--initial-checkpoint", help="weights to start from (EMA weights if present)")
    add("--allow-mismatch", action="append", help="prefix of tensors that need not match, e.g. head. (repeatable)")
    add("--resume", help="checkpoint to resume, or auto for the newest in the output folder, if any")
    add("--output", default="runs/classification", help="parent folder of all runs")
    add("--experiment", help="name of this run's folder in --output (default: the variant's, config's or model's)")
    add(
        "--validation-batch-size",
        type=int,
        help="validation batch size per process (default: --batch-size)",
    )
    add("--checkpoint-hist", type=int, default=10, help="number of best checkpoints to keep")
    add("--recovery-interval", type=int, default=500, help="updates between mid-epoch checkpoints, 0 to disable")
    add("--log-interval", type=int, default=50, help="updates between log lines")


COMMON_OPTIONS = (_add_data_options, _add_model_options, _add_computation_options)
TRAINING_OPTIONS = (_add_augmentation_options, _add_optimization_options, _add_run_options)


def build_parser(train: bool) -> argparse.ArgumentParser:
    """Build the parser of ``train.py`` (``train=True``) or ``validate.py`` (``train=False``)."""
    name = "train.py" if train else "validate.py"
    parser = _Parser(prog=name, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", help="YAML file of options, overridden by the command line")
    parser.add_argument("--variant", help="variant in the YAML file, e.g. a row of an ablation")
    for add_options in (*COMMON_OPTIONS, *(TRAINING_OPTIONS if train else (_add_evaluation_options,))):
        add_options(parser)
    return parser


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Load a YAML file merged over its bases, with underscores in the keys.

    Raises:
        UserError: The file is missing, not a mapping, or its own base.
    """
    return _load_yaml(Path(path), ())


def _load_yaml(path: Path, users: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in users:
        raise UserError(f"{path} is its own base")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"config file {path} does not exist" + (f" (base of {users[-1]})" if users else "")) from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must contain 'key: value' lines")
    base = values.pop("base", None)
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    inherited = _load_yaml(path.parent / base, (*users, path.resolve())) if base else {}
    return {**inherited, **values}


def _choose(values: dict[str, Any], name: str | None, path: str) -> dict[str, Any]:
    """Merge the selected variant over the file's values."""
    variants = values.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(own, dict) for own in variants.values()):
        raise UserError(f"{path}: variants must contain 'name: {{key: value}}' lines")
    variants = {str(key): own for key, own in variants.items()}
    if not variants and name:
        raise UserError(f"{path} has no variants: omit --variant {name}")
    if variants and name not in variants:
        close = did_you_mean(name, variants) if name else f", one of {', '.join(variants)}"
        raise UserError(f"{path} has no variant '{name}'{close}" if name else f"{path} needs --variant{close}")
    chosen = {str(key).replace("-", "_"): value for key, value in variants.get(name, {}).items()}
    return {**values, **chosen}


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "variant")}


def _convert(action: argparse.Action, value: Any, path: str) -> Any:
    """Validate and convert a YAML value as the command line does; YAML reads ``2e-3`` as a string."""
    name = action.dest.replace("_", "-")

    def scalar(item: Any) -> Any:
        if isinstance(item, bool | dict | list):
            raise ValueError
        return (action.type or str)(str(item))

    if value is None:
        return None
    try:
        if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
            if not isinstance(value, bool):
                raise ValueError
        elif isinstance(action, Keywords):
            if not isinstance(value, dict):
                raise ValueError
        elif isinstance(action.nargs, int) or isinstance(action, argparse._AppendAction):
            if not isinstance(value, list) or (action.nargs and len(value) != action.nargs):
                raise ValueError
            value = [scalar(item) for item in value]
        else:
            value = scalar(value)
    except ValueError:
        raise UserError(f"{path}: {name}: {value!r} is not a valid value; see --help") from None
    if action.choices and value not in action.choices:
        raise UserError(f"{path}: {name}: {value!r} is not one of {', '.join(action.choices)}")
    return value


def parse_args(
    argv: Sequence[str] | None, train: bool, extend: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """Parse the command line on top of the YAML file given by ``--config`` and validate the result.

    Both programs can share a YAML file: each ignores the keys of the other. ``extend`` adds options to the parser.

    Raises:
        UserError: Unknown key or invalid value; the message names the remedy.
        SystemExit: Malformed command line (code 2).
    """
    parser = build_parser(train)
    if extend:
        extend(parser)
    first, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]}{did_you_mean(unknown[0].split('=')[0], options)}")
    args = first
    if first.config:
        mine = _actions(parser)
        valid = {**_actions(build_parser(not train)), **mine}
        values = _choose(load_yaml(first.config), first.variant, first.config)
        for key in values:
            if key not in valid:
                close = did_you_mean(key.replace("_", "-"), [name.replace("_", "-") for name in valid])
                raise UserError(f"{first.config}: unknown key '{key.replace('_', '-')}'{close}")
        values = {key: _convert(valid[key], value, first.config) for key, value in values.items()}
        parser.set_defaults(**{key: value for key, value in values.items() if key in mine})
        args = parser.parse_args(argv)
    elif first.variant:
        raise UserError(f"--variant {first.variant} needs a --config that defines it")
    _check(args, train)
    return args


def _check(args: argparse.Namespace, train: bool) -> None:
    if not args.model:
        raise UserError("no model: pass --model NAME, or --config FILE, such as the args.yaml of a run")
    base_name = args.model.split(".")[0]
    if not timm.is_model(base_name) and not args.model.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise UserError(f"unknown model '{args.model}'{did_you_mean(base_name, timm.list_models())}")
    if not args.data_dir and args.dataset.split("/")[0].lower() not in NO_FOLDER_PREFIXES:
        raise UserError("no data: pass --data-dir FOLDER (see docs/data.md)")
    reader = args.dataset.split("/")[0].lower()
    if reader not in READERS:
        raise UserError(f"unknown reader '{reader}' in --dataset {args.dataset}{did_you_mean(reader, READERS)}")
    for name, (low, high, bounds) in RANGES.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        above = value > low if bounds[0] == "(" else value >= low
        below = value < high if bounds[1] == ")" else value <= high
        if not (above and below):
            interval = f"{bounds[0]}{low}, {high}{bounds[1]}"
            raise UserError(f"--{name.replace('_', '-')} must be in {interval}, got {value}")
    if not train:
        if not args.checkpoint:
            raise UserError("no weights: pass --checkpoint FILE")
        if args.results_file and Path(args.results_file).suffix not in (".json", ".csv"):
            raise UserError(f"--results-file must end in .json or .csv, got {args.results_file}")
        return
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if not 0 < low <= high:
            raise UserError(f"--{name} must be two increasing positive numbers, got {low} {high}")
    if args.warmup_epochs >= args.epochs:
        raise UserError(
            f"--warmup-epochs must be below --epochs {args.epochs}, got {args.warmup_epochs}: pass a lower one"
        )
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f"--batch-size must be even with mixup or cutmix, got {args.batch_size}")


def save_yaml(args: argparse.Namespace, path: str | Path) -> None:
    """Write all options to a YAML file for ``--config``."""
    values = {key.replace("_", "-"): value for key, value in vars(args).items() if key not in ("config", "variant")}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False))
