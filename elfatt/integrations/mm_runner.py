"""What the programs of both dense tasks share: their command line, and how mmengine's Runner is set up."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import Runner, find_latest_checkpoint, load_checkpoint
from torch import nn
from torch.utils.data import DataLoader

import elfatt.integrations.openmmlab  # noqa: F401  before mmdet
from elfatt.layers import align_gradients
from elfatt.ops import BACKENDS, active_backend, set_default_backend

# mmengine's list of what a checkpoint may hold lacks the float32 arrays of its own history of losses; a file with
# anything beyond the list is unpickled without restraint, after a warning
torch.serialization.add_safe_globals([np.dtypes.Float32DType])


class CheckedRunner(Runner):
    """mmengine's Runner, which stops at weights of another model, and at data without images or of other classes."""

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        """See ``Runner``.

        Raises:
            ValueError: The data set cannot be trained on or evaluated; its folder or annotation file is named.
        """
        if isinstance(dataloader, dict) and isinstance(dataloader["dataset"], dict):
            dataset = DATASETS.build(_lazy(dataloader["dataset"]))
            for part in _unwrap(dataset):
                _load(part)
            dataset.full_init()
            dataloader = {**dataloader, "dataset": dataset}
        return Runner.build_dataloader(dataloader, *args, **kwargs)

    def load_checkpoint(self, filename: str, map_location="cpu", strict: bool = True, **kwargs) -> dict:
        """See ``Runner``; a tensor that is missing or left over is an error here.

        Raises:
            RuntimeError: The checkpoint is of another model; the tensors are named.
        """
        return super().load_checkpoint(filename, map_location, strict, **kwargs)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """See ``Runner``."""
        if self.distributed:
            align_gradients(model)
        return super().wrap_model(model_wrapper_cfg, model)


class DrawImages(Hook):
    """Draws every evaluated image, its truth on the left and its prediction on the right; mmengine lets rank 0 draw.

    Args:
        folder: Where the pictures go, under the images' names.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        """See ``Hook``."""
        for sample in outputs:
            image, name = mmcv.imread(sample.img_path, channel_order="rgb"), Path(sample.img_path).name
            runner.visualizer.add_datasample(name, image, sample, out_file=str(self.folder / name))


def _lazy(config: dict) -> dict:
    """The configuration of a data set, and of those that it wraps, that reads nothing before it is told to."""
    config = {**config, "lazy_init": True}
    if "dataset" in config:
        config["dataset"] = _lazy(config["dataset"])
    if "datasets" in config:
        config["datasets"] = [_lazy(dataset) for dataset in config["datasets"]]
    return config


def _unwrap(dataset) -> list:
    """The data sets that a RepeatDataset, a ConcatDataset or another wrapper holds, or the one given."""
    if hasattr(dataset, "dataset"):
        return _unwrap(dataset.dataset)
    return [part for inner in getattr(dataset, "datasets", ()) for part in _unwrap(inner)] or [dataset]


def _load(dataset) -> None:
    source = dataset.ann_file or dataset.data_prefix["img_path"]
    try:
        dataset.full_init()
    except ValueError as error:
        if dataset.data_list:
            raise
        # mmengine cannot pack an empty list
        raise ValueError(f"{source} holds no image that can be used (filter_cfg={dataset.filter_cfg})") from error
    except KeyError as error:
        raise ValueError(f"{source} has no {error}: scripts/prepare_coco.sh checks the whole file") from error
    classes, categories = dataset.metainfo["classes"], getattr(dataset, "cat_ids", None)
    if categories is not None and len(categories) != len(classes):
        raise ValueError(
            f"{source} names {len(categories)} of the {len(classes)} classes of the configuration: "
            "list all of them in its 'categories', or set metainfo and num_classes to what it holds"
        )


def parse_train(argv: list[str] | None, task: str) -> argparse.Namespace:
    """Command line of a ``train.py``; see ``train``."""
    parser = _parser(task, "Trains", "train.py")
    add = parser.add_argument
    add("--pretrained", help="classification checkpoint for the backbone, ours or an official one")
    add("--resume", help="checkpoint to continue, or auto: the newest one of the work dir, if any")
    add("--amp", action=argparse.BooleanOptionalAction, help="mixed precision, instead of what the config says")
    return _parse(parser, argv)


def parse_test(argv: list[str] | None, task: str) -> argparse.Namespace:
    """Command line of a ``test.py``; see ``test``."""
    parser = _parser(task, "Evaluates", "test.py")
    add = parser.add_argument
    add("checkpoint", help="of train.py")
    add("--show-dir", help="folder for pictures of truth and prediction; of N processes the first draws its share")
    if task == "segmentation":
        add("--tta", action="store_true", help="average over six scales and flips")
    return _parse(parser, argv, "checkpoint")


def parse_inference(argv: list[str] | None, task: str) -> argparse.Namespace:
    """Command line of an ``inference.py``."""
    parser = argparse.ArgumentParser(prog=f"{task}/inference.py", description="Draws the prediction for an image.")
    add = parser.add_argument
    add("config", help=f"that trained the model, e.g. of configs/{task}")
    add("checkpoint", help="of train.py")
    add("image", help="image file")
    add("output", help="picture to write")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    _add_backend(parser)
    if task == "detection":
        add("--score", type=float, default=0.3, help="leave out instances below it (default: %(default)s)")
    args = _parse(parser, argv, "checkpoint", "image")
    if not cv2.haveImageReader(args.image):
        _stop(args, f"image {args.image} is no picture that OpenCV reads: give a JPEG or PNG file")
    return args


def train(args: argparse.Namespace, task: str) -> Runner:
    """Trains as the command line says and returns the runner."""
    config = _config(args, task)
    resumed = find_latest_checkpoint(config.work_dir) if args.resume == "auto" else args.resume
    if resumed:
        _check_file(args, "resume", resumed)
        config.resume, config.load_from = True, resumed
        config.model.backbone.pretrained = None  # the checkpoint has the backbone's weights
    elif args.pretrained:
        _check_file(args, "pretrained", args.pretrained)
        config.model.backbone.pretrained = args.pretrained
    _choose_precision(config.optim_wrapper, args.amp)
    runner = CheckedRunner.from_cfg(config)
    runner.train()
    return runner


def test(args: argparse.Namespace, task: str) -> dict[str, float]:
    """Evaluates as the command line says and returns the metrics."""
    config = _config(args, task)
    config.load_from = args.checkpoint
    if getattr(args, "tta", False):
        if not config.get("tta_pipeline"):
            _stop(args, f"--tta: {args.config} has no tta_pipeline; leave --tta out or add one")
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = ConfigDict(**config.tta_model, module=config.model)
    runner = CheckedRunner.from_cfg(config)
    if args.show_dir:
        runner.register_hook(DrawImages(args.show_dir))
    return runner.test()


def load_model(args: argparse.Namespace, init: Callable[..., nn.Module]) -> nn.Module:
    """The trained model of an ``inference.py``, which knows the classes of its configuration.

    Args:
        args: Of ``parse_inference``.
        init: ``init_model`` of mmseg or ``init_detector`` of mmdet.

    Raises:
        RuntimeError: The checkpoint is of another model; the tensors are named.
    """
    config = Config.fromfile(args.config)
    _choose_backend(args, config, args.device)
    model = init(config, device=args.device)
    load_checkpoint(model, args.checkpoint, map_location="cpu", strict=True)  # init passes over what does not fit
    model.dataset_meta = DATASETS.build(_lazy(model.cfg.test_dataloader.dataset)).metainfo
    return model


def _parser(task: str, verb: str, program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{task}/{program}", description=f"{verb} a model of configs/{task}.")
    add = parser.add_argument
    add("config", help=f"e.g. of configs/{task}")
    add("--data-dir", help="root of the data set, instead of the config's data_root")
    add("--work-dir", help=f"folder for logs and checkpoints (default: runs/{task}/CONFIG)")
    launcher = "pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none"
    add(
        "--launcher",
        choices=("none", "pytorch", "slurm"),
        default=launcher,
        help="who started the processes (default: pytorch under torchrun, or else none)",
    )
    _add_backend(parser)
    add("--cfg-options", nargs="+", action=DictAction, help="KEY=VALUE …: any field, e.g. train_cfg.max_iters=80000")
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    text = f"code of the attention operations (default: the config's backend, or {active_backend()})"
    parser.add_argument("--backend", choices=BACKENDS, help=text)


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None, *files: str) -> argparse.Namespace:
    """Parses; a file or folder that is not there ends the program in one line, before anything is built."""
    args = parser.parse_args(argv)
    args.program = parser.prog
    for name in ("config", *files):
        _check_file(args, name, getattr(args, name))
    if getattr(args, "data_dir", None) and not Path(args.data_dir).is_dir():
        _stop(args, f"--data-dir {args.data_dir} is no folder")
    return args


def _check_file(args: argparse.Namespace, name: str, path: str) -> None:
    if not Path(path).is_file():
        _stop(args, f"{name} {path} is no file")


def _stop(args: argparse.Namespace, message: str) -> NoReturn:
    raise SystemExit(f"{args.program}: error: {message}")


def _choose_backend(args: argparse.Namespace, config: Config, device: str | None) -> None:
    """Runs what is asked for and keeps its name in the configuration, which mmengine logs and saves."""
    config.backend = args.backend or config.get("backend") or active_backend()
    try:
        set_default_backend(config.backend, device)
    except ValueError as error:
        _stop(args, str(error))


def _config(args: argparse.Namespace, task: str) -> Config:
    """The configuration with the command line's changes, ready for the machine that it runs on."""
    config = Config.fromfile(args.config)
    if args.launcher == "slurm" and not torch.cuda.is_available():
        _stop(args, "--launcher slurm needs a GPU for each process: on CPUs use scripts/slurm/train.sbatch")
    if args.data_dir:
        if not config.get("data_root"):
            _stop(args, f"--data-dir replaces data_root, which {args.config} has not: set it there")
        _move(config, config.data_root.rstrip("/"), args.data_dir.rstrip("/"))
    if args.cfg_options:
        config.merge_from_dict(args.cfg_options)
    # on a GPU the process's own is not known yet
    _choose_backend(args, config, None if torch.cuda.is_available() else "cpu")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(name) and config[name].get("num_workers") == 0:
            config[name].persistent_workers = False  # PyTorch refuses to keep what is not there
    config.work_dir = args.work_dir or config.get("work_dir") or f"runs/{task}/{Path(args.config).stem}"
    config.launcher = args.launcher
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not torch.cuda.is_available():
        config.sync_bn = None  # PyTorch synchronises batch norm on GPUs only
        if args.launcher == "pytorch" and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")  # mmengine's own start and wrapper ask for a GPU
            config.model_wrapper_cfg = {"device_ids": None, "broadcast_buffers": False}
    return config


def _move(node, old: str, new: str):
    """Replaces a folder at the head of every path in a configuration."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if isinstance(value, str) and (value == old or value.startswith(old + "/")):
            node[key] = new + value[len(old) :]
        elif isinstance(value, dict | list):
            _move(value, old, new)


def _choose_precision(wrapper: ConfigDict, amp: bool | None) -> None:
    """Mixed precision as asked, or as configured; without a GPU there is none.

    Raises:
        ValueError: It was asked for and there is no GPU.
    """
    if not torch.cuda.is_available():
        if amp:
            raise ValueError("--amp needs a GPU: leave it out")
        if amp is None and wrapper.type == "AmpOptimWrapper":
            print_log("no GPU: training in float32, not in mixed precision", logger="current", level=logging.WARNING)
        amp = False
    if amp is None:
        return
    wrapper.type = "AmpOptimWrapper" if amp else "OptimWrapper"
    if amp:
        wrapper.loss_scale = "dynamic"
    else:
        wrapper.pop("loss_scale", None)
        wrapper.pop("dtype", None)
