"""What the programs of both dense tasks share: their command line, and how mmengine's Runner is set up."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

import elfatt.integrations.openmmlab  # noqa: F401  before mmdet

# mmengine's checkpoints hold its history of losses as numpy arrays, which PyTorch refuses to load otherwise
torch.serialization.add_safe_globals([np.dtypes.Float32DType, np.dtypes.Float64DType, np.dtypes.Int64DType])


class CheckedRunner(Runner):
    """mmengine's Runner, which stops at weights of another model, and at data without images or of other classes."""

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        """See ``Runner``.

        Raises:
            ValueError: The data set cannot be trained on or evaluated; its folder or annotation file is named.
        """
        if isinstance(dataloader, dict) and isinstance(dataloader["dataset"], dict):
            dataset = DATASETS.build({**dataloader["dataset"], "lazy_init": True})
            _load(dataset)
            dataloader = {**dataloader, "dataset": dataset}
        return Runner.build_dataloader(dataloader, *args, **kwargs)

    def load_checkpoint(self, filename: str, map_location="cpu", strict: bool = True, **kwargs) -> dict:
        """See ``Runner``; a tensor that is missing or left over is an error here.

        Raises:
            RuntimeError: The checkpoint is of another model; the tensors are named.
        """
        return super().load_checkpoint(filename, map_location, strict, **kwargs)


def _load(dataset) -> None:
    source = dataset.ann_file or dataset.data_prefix["img_path"]
    try:
        dataset.full_init()
    except ValueError as error:
        if dataset.data_list:
            raise
        # mmengine cannot pack an empty list
        raise ValueError(f"{source} holds no image that can be used (filter_cfg={dataset.filter_cfg})") from error
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
    add(
        "--resume",
        nargs="?",
        const="auto",
        help="continue the newest checkpoint of the work dir, if any, or the one that is named",
    )
    add("--amp", action=argparse.BooleanOptionalAction, help="mixed precision, instead of what the config says")
    return _parse(parser, argv, "pretrained")


def parse_test(argv: list[str] | None, task: str) -> argparse.Namespace:
    """Command line of a ``test.py``; see ``test``."""
    parser = _parser(task, "Evaluates", "test.py")
    add = parser.add_argument
    add("checkpoint", help="of train.py")
    add("--show-dir", help="folder for pictures of the predictions")
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
    if task == "detection":
        add("--score", type=float, default=0.3, help="leave out instances below it (default: %(default)s)")
    return _parse(parser, argv, "checkpoint", "image")


def train(args: argparse.Namespace, task: str) -> Runner:
    """Trains as the command line says and returns the runner."""
    config = _config(args, task)
    if args.pretrained:
        config.model.backbone.pretrained = args.pretrained
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    _choose_precision(config.optim_wrapper, args.amp)
    runner = CheckedRunner.from_cfg(config)
    runner.train()
    return runner


def test(args: argparse.Namespace, task: str) -> dict[str, float]:
    """Evaluates as the command line says and returns the metrics."""
    config = _config(args, task)
    config.load_from = args.checkpoint
    if args.show_dir:
        folder = str(Path(args.show_dir).resolve())
        config.default_hooks.visualization.draw = True
        if task == "detection":
            config.default_hooks.visualization.test_out_dir = folder
        else:  # mmseg's hook draws through the visualizer's backends: DIR/vis_data/vis_image
            config.visualizer.save_dir = folder
    if getattr(args, "tta", False):
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = ConfigDict(**config.tta_model, module=config.model)
    return CheckedRunner.from_cfg(config).test()


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
    add("--cfg-options", nargs="+", action=DictAction, help="KEY=VALUE …: any field, e.g. train_cfg.max_iters=80000")
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None, *files: str) -> argparse.Namespace:
    """Parses; a file or folder that is not there ends the program in one line, before anything is built."""
    args = parser.parse_args(argv)
    for name in ("config", *files):
        path = getattr(args, name)
        if path and not Path(path).is_file():
            parser.exit(2, f"{parser.prog}: error: {name} {path} is no file\n")
    if getattr(args, "data_dir", None) and not Path(args.data_dir).is_dir():
        parser.exit(2, f"{parser.prog}: error: --data-dir {args.data_dir} is no folder\n")
    return args


def _config(args: argparse.Namespace, task: str) -> Config:
    """The configuration with the command line's changes, ready for the machine that it runs on."""
    config = Config.fromfile(args.config)
    if args.data_dir:
        _move(config, config.data_root.rstrip("/"), args.data_dir.rstrip("/"))
    if args.cfg_options:
        config.merge_from_dict(args.cfg_options)
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
