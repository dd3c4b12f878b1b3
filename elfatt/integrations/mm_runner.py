"""Command line and Runner setup shared by the segmentation and detection programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, cast

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import BaseLoop, Runner, load_checkpoint
from torch import nn
from torch.utils.data import DataLoader

import elfatt.integrations.openmmlab  # noqa: F401  before mmdet
from elfatt.data import UserError, read_image
from elfatt.integrations.mm_checks import check_batch_norm, check_channels
from elfatt.integrations.mm_datasets import (
    check_evaluator,
    check_same_classes,
    check_scored,
    check_training_masks,
    lazy,
    open_dataset,
    warn,
)
from elfatt.integrations.mm_errors import as_user_error, enough_space
from elfatt.integrations.mm_hooks import DrawImages, NameUnseenClasses
from elfatt.integrations.mm_resume import (
    ExactCheckpointHook,
    newest_checkpoint,
    read_checkpoint,
    seed_batches,
    seekable,
)
from elfatt.layers import align_gradients
from elfatt.ops import BACKENDS, active_backend, set_default_backend
from elfatt.preemption import Preemption
from elfatt.processes import start_worker

# mmengine's safe globals lack the float32 arrays of its own loss history, and it falls back to unrestricted unpickling
# for anything not listed, with a warning
torch.serialization.add_safe_globals([np.dtypes.Float32DType])


class CheckedRunner(Runner):
    """mmengine's ``Runner`` with checks before the first step and one-line errors."""

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """See ``Runner``.

        Raises:
            UserError: The dataset cannot be used; the message names its folder or annotation file.
        """
        if isinstance(dataloader, dict) and isinstance(dataloader["dataset"], dict):
            dataloader = {**dataloader, "dataset": open_dataset(dataloader["dataset"])}
        loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
        if seed is not None:
            seed_batches(loader, seed)
        return loader

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """See ``Runner``.

        Raises:
            UserError: The config does not describe a model.
        """
        with as_user_error("model", ValueError, TypeError):
            return super().build_model(model)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """See ``Runner``.

        Raises:
            UserError: Masks with fewer than two classes, or batch norm over single values.
        """
        loop = super().build_train_loop(seekable(loop) if isinstance(loop, dict) else loop)
        check_training_masks(loop.dataloader.dataset)
        check_batch_norm(self.model, loop.dataloader.batch_size)
        return loop

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """See ``Runner``.

        Raises:
            UserError: The evaluated dataset or annotation file has other classes.
        """
        return self._checked(super().build_val_loop(loop), "val_evaluator")

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """See ``build_val_loop``."""
        return self._checked(super().build_test_loop(loop), "test_evaluator")

    def build_evaluator(self, evaluator: dict | list[dict] | Evaluator) -> Evaluator:
        """See ``Runner``.

        Raises:
            UserError: COCO's evaluation could not read the annotation file, or would not end.
        """
        check_scored(evaluator)
        return super().build_evaluator(evaluator)

    def _checked(self, loop: BaseLoop, name: str) -> BaseLoop:
        settings = self.cfg.get(name)
        source = settings.get("ann_file", name) if isinstance(settings, dict) else name
        classes = loop.dataloader.dataset.metainfo["classes"]
        check_evaluator(loop.evaluator, source, classes)
        if isinstance(self._train_loop, BaseLoop):
            check_same_classes("train_dataloader", classes, self._train_loop.dataloader.dataset.metainfo["classes"])
        return loop

    def _init_model_weights(self) -> None:
        with as_user_error("pretrained weights", ValueError, FileNotFoundError):
            super()._init_model_weights()

    def load_checkpoint(self, filename: str, map_location="cpu", strict: bool = True, **kwargs) -> dict:
        """See ``Runner``; missing or unexpected tensors are errors.

        Raises:
            UserError: No checkpoint, or one of another model (the message names the tensors), of other classes (when
                resuming or evaluating), or without optimizer state (when resuming).
        """
        with as_user_error(f"checkpoint {filename}", Exception):
            checkpoint = super().load_checkpoint(filename, map_location, strict, **kwargs)
        if self._resume or not isinstance(self._train_loop, BaseLoop):
            _check_trained_classes(filename, checkpoint, self.visualizer.dataset_meta)
        if self._resume and "optimizer" not in checkpoint:
            remedy = f"resume another, or start from its weights with --cfg-options load_from={filename}"
            raise UserError(f"checkpoint {filename}", "has no optimizer state", remedy)
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """See ``Runner``; the write is atomic, and on the disk before it replaces an older file.

        Raises:
            UserError: The disk is full.
        """
        whole, writes = Path(out_dir, filename), is_main_process()
        part = whole.with_name(f"{filename}.tmp")
        with enough_space(out_dir):
            try:
                super().save_checkpoint(out_dir, part.name, *args, **kwargs)
                if writes:
                    with open(part, "rb") as file:
                        os.fsync(file.fileno())
                    part.replace(whole)
            finally:
                if writes:
                    part.unlink(missing_ok=True)

    def train(self) -> nn.Module:
        """See ``Runner``.

        Raises:
            UserError: The disk is full.
            Preempted: A signal has stopped the run, after saving its state.
        """
        with enough_space(self.work_dir), Preemption() as self.preemption:
            return super().train()

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """See ``Runner``."""
        if self.distributed:
            align_gradients(model)
        return super().wrap_model(model_wrapper_cfg, model)


def _check_trained_classes(path: str, checkpoint: dict, meta: dict | None) -> None:
    trained = (checkpoint.get("meta", {}).get("dataset_meta") or {}).get("classes")
    if trained and meta and meta.get("classes"):
        check_same_classes(f"checkpoint {path}", meta["classes"], trained)


def parse_train(argv: list[str] | None, task: str) -> argparse.Namespace:
    """Parse the command line of a ``train.py``; see ``train``."""
    parser = _parser(task, "Train", "train.py")
    add = parser.add_argument
    add("--pretrained", help="classification checkpoint for the backbone, from this project or official")
    add("--resume", help="checkpoint to resume, or auto for the newest in the work dir, if any")
    add("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (default: the config's)")
    return _parse(parser, argv)


def parse_test(argv: list[str] | None, task: str) -> argparse.Namespace:
    """Parse the command line of a ``test.py``; see ``test``."""
    parser = _parser(task, "Evaluate", "test.py")
    add = parser.add_argument
    add("checkpoint", help="checkpoint of train.py")
    add("--show-dir", help="folder for images of ground truth and prediction; only rank 0 draws, its own share")
    if task == "segmentation":
        add("--tta", action="store_true", help="average over six scales and flips")
    return _parse(parser, argv, "checkpoint")


def parse_inference(argv: list[str] | None, task: str) -> argparse.Namespace:
    """Parse the command line of an ``inference.py``."""
    parser = argparse.ArgumentParser(prog=f"{task}/inference.py", description="Draw the prediction for an image.")
    add = parser.add_argument
    add("config", help=f"config the model was trained with, e.g. in configs/{task}")
    add("checkpoint", help="checkpoint of train.py")
    add("image", help="image file")
    add("output", help="output image")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    _add_backend(parser)
    if task == "detection":
        add("--score", type=float, default=0.3, help="minimum score of the instances to draw (default: %(default)s)")
    args = _parse(parser, argv, "checkpoint", "image")
    if Path(args.output).resolve() in (Path(path).resolve() for path in (args.config, args.checkpoint, args.image)):
        _stop(args, f"output {args.output} would overwrite an input: pass another name")
    try:
        read_image(args.image)
    except (OSError, SyntaxError, ValueError) as error:
        _stop(args, f"image {args.image} cannot be read ({error})")
    if not cv2.haveImageWriter(args.output):
        _stop(args, f"output {args.output} has no image extension: use one such as .png or .jpg")
    return args


def train(args: argparse.Namespace, task: str) -> Runner:
    """Train with the parsed options and return the runner."""
    config = _config(args, task)
    resumed = newest_checkpoint(_checkpoint_folder(config)) if args.resume == "auto" else args.resume
    if resumed:
        _check_file(args, "resume", resumed)
        config.resume, config.load_from = True, str(resumed)
        config.model.backbone.pretrained = None  # the checkpoint has the backbone's weights
        _resume_seed(config)
    elif args.resume:
        print_log(f"no checkpoint in {_checkpoint_folder(config)}: training starts from the beginning", "current")
    if not resumed and args.pretrained:
        _check_file(args, "pretrained", args.pretrained)
        config.model.backbone.pretrained = args.pretrained
    _choose_precision(config.optim_wrapper, args.amp)
    runner = _build_runner(config)
    runner.train()
    return runner


def _checkpoint_folder(config: Config) -> Path:
    """Return the folder that mmengine's ``CheckpointHook`` writes to."""
    folder = os.path.abspath(config.work_dir)
    out_dir = (config.get("default_hooks", {}).get("checkpoint") or {}).get("out_dir")
    return Path(folder) if out_dir in (None, folder) else Path(out_dir, os.path.basename(folder))


def _resume_seed(config: Config) -> None:
    """Set the resumed run's seed before the samplers are built; mmengine sets it after."""
    seed = read_checkpoint(config.load_from).get("meta", {}).get("seed")
    randomness = config.get("randomness") or ConfigDict()
    if randomness.get("seed") not in (None, seed):
        warn(f"randomness.seed={randomness.seed} has no effect: the resumed run's seed is {seed}")
    if seed is not None:
        config.randomness = {**randomness, "seed": seed}


def test(args: argparse.Namespace, task: str) -> dict[str, float]:
    """Evaluate with the parsed options and return the metrics."""
    config = _config(args, task)
    config.load_from = args.checkpoint
    if getattr(args, "tta", False):
        if not config.get("tta_pipeline"):
            _stop(args, f"--tta: {args.config} has no tta_pipeline; add one or remove --tta")
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = ConfigDict(**config.tta_model, module=config.model)
    runner = _build_runner(config)
    if args.show_dir:
        runner.register_hook(DrawImages(args.show_dir))
    return runner.test()


def _build_runner(config: Config) -> CheckedRunner:
    runner = CheckedRunner.from_cfg(config)
    if config.default_scope == "mmseg":
        runner.register_hook(NameUnseenClasses())
    return runner


def load_model(args: argparse.Namespace, init: Callable[..., nn.Module]) -> nn.Module:
    """Load the trained model of an ``inference.py``, with the classes of its config.

    Args:
        args: Options from ``parse_inference``.
        init: ``init_model`` of mmseg or ``init_detector`` of mmdet.

    Raises:
        UserError: No model in the config, or a checkpoint of another model (the message names the tensors) or of other
            classes.
    """
    config = Config.fromfile(args.config)
    _choose_backend(args, config, args.device)
    check_channels(config)
    with as_user_error("model", ValueError, TypeError):
        model = init(config, device=args.device)
    with as_user_error(f"checkpoint {args.checkpoint}", Exception):  # init ignores mismatches
        checkpoint = load_checkpoint(model, args.checkpoint, map_location="cpu", strict=True)
    dataset = cast(Config, model.cfg).test_dataloader.dataset
    model.dataset_meta = meta = DATASETS.build(lazy(dataset)).metainfo
    _check_trained_classes(args.checkpoint, checkpoint, meta)
    return model


def _parser(task: str, verb: str, program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{task}/{program}", description=f"{verb} a model of configs/{task}.")
    add = parser.add_argument
    add("config", help=f"config file, e.g. in configs/{task}")
    add("--data-dir", help="dataset root (default: the config's data_root)")
    add("--work-dir", help=f"folder for logs and checkpoints (default: runs/{task}/CONFIG)")
    launcher = "pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none"
    add(
        "--launcher",
        choices=("none", "pytorch", "slurm"),
        default=launcher,
        help="job launcher (default: pytorch under torchrun, none otherwise)",
    )
    _add_backend(parser)
    add("--cfg-options", nargs="+", action=DictAction, help="fields to override, e.g. train_cfg.max_iters=80000")
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    text = f"backend of the attention operations (default: the config's, or {active_backend()})"
    parser.add_argument("--backend", choices=BACKENDS, help=text)


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None, *files: str) -> argparse.Namespace:
    """Parse and check that files and folders exist; exit with one line if not."""
    args = parser.parse_args(argv)
    args.program = parser.prog
    for name in ("config", *files):
        _check_file(args, name, getattr(args, name))
    if getattr(args, "data_dir", None) and not Path(args.data_dir).is_dir():
        _stop(args, f"--data-dir {args.data_dir} is not a folder")
    for name in ("work_dir", "show_dir"):
        folder = getattr(args, name, None)
        if folder and Path(folder).is_file():
            _stop(args, f"--{name.replace('_', '-')} {folder} is a file: pass a folder")
    return args


def _check_file(args: argparse.Namespace, name: str, path: str | Path) -> None:
    if not Path(path).is_file():
        _stop(args, f"{name} {path} is not a file")


def _stop(args: argparse.Namespace, message: str) -> NoReturn:
    raise SystemExit(f"{args.program}: error: {message}")


def _choose_backend(args: argparse.Namespace, config: Config, device: str | None) -> None:
    """Set the backend and record it in the config, which mmengine logs and saves."""
    config.backend = args.backend or config.get("backend") or active_backend()
    try:
        set_default_backend(config.backend, device)
    except ValueError as error:
        _stop(args, str(error))


def _config(args: argparse.Namespace, task: str) -> Config:
    """Load the config and apply the command line and the limits of this machine."""
    config = Config.fromfile(args.config)
    if args.launcher == "slurm" and not torch.cuda.is_available():
        _stop(args, "--launcher slurm needs one GPU per process: on CPUs use scripts/slurm/train.sbatch")
    if args.data_dir:
        if not config.get("data_root"):
            _stop(args, f"--data-dir overrides data_root, which {args.config} does not define: add it there")
        _move(config, config.data_root.rstrip("/"), args.data_dir.rstrip("/"))
    if args.cfg_options:
        config.merge_from_dict(args.cfg_options)
    # the process's own GPU is not known yet
    _choose_backend(args, config, None if torch.cuda.is_available() else "cpu")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(name) and config[name].get("num_workers") == 0:
            config[name].persistent_workers = False  # PyTorch rejects it without workers
    check_channels(config)
    _check_tensorboard(config)
    saver = config.get("default_hooks", {}).get("checkpoint") or ConfigDict()
    if saver.get("type") == CheckpointHook.__name__:
        saver.type = ExactCheckpointHook.__name__
    config.work_dir = args.work_dir or config.get("work_dir") or f"runs/{task}/{Path(args.config).stem}"
    config.launcher = args.launcher
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not torch.cuda.is_available():
        config.sync_bn = None  # PyTorch synchronises batch norm on GPUs only
        if args.launcher == "pytorch" and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")  # mmengine's own initialisation and wrapper need a GPU
            config.model_wrapper_cfg = {"device_ids": None, "broadcast_buffers": False}
    return config


def _check_tensorboard(config: Config) -> None:
    """Log without TensorBoard where it is not installed."""
    visualizer = config.get("visualizer") or ConfigDict()
    others = [backend for backend in visualizer.get("vis_backends") or [] if backend["type"] != "TensorboardVisBackend"]
    if not find_spec("tensorboard") and len(others) < len(visualizer.get("vis_backends") or []):
        visualizer.vis_backends = others
        print("warning: no TensorBoard logs: pip install tensorboard", file=sys.stderr)


def _move(node, old: str, new: str):
    """Replace the leading folder of every path in a config, in place."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if isinstance(value, str) and (value == old or value.startswith(old + "/")):
            node[key] = new + value[len(old) :]
        elif isinstance(value, dict | list):
            _move(value, old, new)


def _choose_precision(wrapper: ConfigDict, amp: bool | None) -> None:
    """Set mixed precision as requested or configured; without a GPU, disable it.

    Raises:
        UserError: Mixed precision was requested without a GPU.
    """
    if not torch.cuda.is_available():
        if amp:
            raise UserError("--amp needs a GPU: remove it")
        if amp is None and wrapper.type == "AmpOptimWrapper":
            warn("no GPU: training in float32 instead of mixed precision")
        amp = False
    if amp is None:
        return
    wrapper.type = "AmpOptimWrapper" if amp else "OptimWrapper"
    if amp:
        wrapper.loss_scale = "dynamic"
    else:
        wrapper.pop("loss_scale", None)
        wrapper.pop("dtype", None)
