"""Train an image classifier: ``python -m classification.train --config FILE --data-dir FOLDER``, or under torchrun.

Recipes are YAML files in configs/classification; the options are defined in ``config.py``. A run interrupted at any
point and resumed with ``--resume auto`` ends with bit-identical weights (on CPUs; on GPUs as far as the kernels are
deterministic).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad, distribute_bn, random_seed, trim_summary
from timm.utils.summary import update_summary
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

import elfatt  # noqa: F401  registers the models with timm
from classification.checkpoint import AtomicSaver, TrainState, find_newest, load, write
from classification.config import parse_args, save_yaml
from classification.data import BrokenImages, Loader, data_config
from classification.evaluate import evaluate
from classification.runtime import LOGGER, autocast, build_model, init_world, load_weights, peak_memory_mib, run_main
from classification.splits import check_class_count, check_labels, check_same_classes, class_names, open_split
from elfatt.checkpoints import LoadReport
from elfatt.conversion import Plan
from elfatt.data import UserError
from elfatt.data.classes import mismatch
from elfatt.layers import align_gradients
from elfatt.preemption import Preempted, Preemption, any_process

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Trainer:
    """Training run.

    Args:
        args: Parsed options of ``config.build_parser(train=True)``.

    Raises:
        UserError: Invalid data, options or checkpoints.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.world = world = init_world(args.device, args.backend)
        self.autocast = autocast(args, world.device)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        name = args.experiment or args.variant or (Path(args.config).stem if args.config else args.model)
        self.folder = Path(args.output, name)

        random_seed(args.seed, 0)
        self.model = build_model(args, drop_path_rate=args.drop_path)
        args.num_classes = self.model.num_classes
        classes = self._open_data()
        self._prepare_model(classes)
        ema = self._wrap_model()
        random_seed(args.seed, world.rank)

        self.parameters = list(self.model.parameters())
        optimizer, scheduler, self.num_epochs = self._create_optimizer()
        scaler = NativeScaler(world.device.type) if args.amp and args.amp_dtype == "float16" else None
        self.state = TrainState(self.model, optimizer, scheduler, scaler, ema, args, world, classes)
        self.erase, self.mixup, self.loss = self._create_loss()
        self.preemption, self.preempted = Preemption(), False
        self.board: SummaryWriter | None = None  # of rank 0
        self._open_folder()

    def _open_data(self) -> dict[str, int] | None:
        """Open both splits, check their classes and return the labels by class name, if known."""
        args, world = self.args, self.world
        config = data_config(args, self.model)
        train, val = (open_split(args, is_train) for is_train in (True, False))
        check_same_classes(train, val)
        check_labels(train, val)
        check_class_count(train, self.model.num_classes)
        self.broken = BrokenImages(args.max_broken_images)
        self.train_loader = Loader(train, args, config, world, self.broken, train=True)
        self.val_loader = Loader(val, args, config, world, self.broken, train=False)
        return class_names(train)

    def _prepare_model(self, classes: dict[str, int] | None) -> None:
        """Load the initial weights and move the model to the device."""
        args, model = self.args, self.model
        if args.initial_checkpoint:
            report = load_weights(model, args.initial_checkpoint, use_ema=True, allow=args.allow_mismatch or ())
            _warn_of_other_classes(report, classes)
        if args.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise UserError(f"model {args.model} has no --grad-checkpointing")
            model.set_grad_checkpointing(True)
        model.to(self.world.device, memory_format=self.memory_format)

    def _wrap_model(self) -> ModelEmaV3 | None:
        """Set up DDP, EMA and compilation, and return the EMA."""
        args, world, model = self.args, self.world, self.model
        self.net: nn.Module = model
        if world.distributed:
            align_gradients(model)
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.net = DistributedDataParallel(model, device_ids=ids)  # broadcasts rank 0's weights
        self.no_sync = self.net.no_sync if world.distributed else nullcontext
        ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema else None
        self.evaluated = {"raw": model} | ({"ema": ema.module} if ema else {})
        if args.compile:
            self.net = torch.compile(self.net)
            self.evaluated = {name: torch.compile(module) for name, module in self.evaluated.items()}
        return ema

    def _create_optimizer(self) -> tuple[Optimizer, Scheduler, int]:
        """Return the optimizer, its schedule, and the number of epochs including cool-down."""
        args = self.args
        decay = {"lr": args.lr, "weight_decay": args.weight_decay}
        groups = self.model if args.filter_bias_and_bn else self.parameters
        try:
            optimizer = create_optimizer_v2(groups, args.opt, **decay, **args.opt_kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer {args.opt} cannot be built with {args.opt_kwargs}: {error}") from error
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            cooldown_epochs=args.cooldown_epochs,
        )
        return optimizer, scheduler, num_epochs

    def _create_loss(self) -> tuple[RandomErasing | None, Mixup | None, nn.Module]:
        """Return random erasing and mixup, if enabled, and the loss."""
        args, erase = self.args, None
        if args.reprob:
            erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=self.world.device)
        if args.mixup or args.cutmix:
            mixup = Mixup(
                mixup_alpha=args.mixup,
                cutmix_alpha=args.cutmix,
                prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob,
                mode=args.mixup_mode,
                label_smoothing=args.smoothing,
                num_classes=self.model.num_classes,
            )
            return erase, mixup, SoftTargetCrossEntropy()
        return erase, None, LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()

    def _open_folder(self) -> None:
        """Resume if requested, otherwise reject a folder that contains a run; then open the logs."""
        args, world = self.args, self.world
        self.saver = AtomicSaver(self.folder, args.checkpoint_hist) if world.primary else None
        found = find_newest(self.folder) if args.resume == "auto" else None
        elsewhere = args.resume not in (None, "auto") and Path(args.resume).resolve().parent != self.folder.resolve()
        if args.resume not in (None, "auto"):
            found = Path(args.resume), load(args.resume)
        if (elsewhere or not args.resume) and any(self.folder.glob("*.pth.tar")):
            raise UserError(f"{self.folder} contains a run: resume it with --resume auto, or pass another --experiment")
        if found:
            path, state = found
            self.state.load_state_dict(state, path)
            if self.saver:
                self.saver.load_state_dict(state["saver"])
            LOGGER.info("resumed %s: epoch %d, batch %d", path, self.state.epoch, self.state.batch)
        elif args.resume:
            LOGGER.info("no checkpoint in %s yet: starting from the beginning", self.folder)
        if world.distributed:
            dist.barrier()  # no process may write before all have read
        if world.primary:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write to {self.folder} ({error.strerror}): choose another --output") from error
            save_yaml(args, self.folder / "args.yaml")
            if args.plan:
                Plan.from_json(args.plan).to_json(self.folder / "plan.json")
            trim_summary(str(self.folder / "summary.csv"), self.state.epoch)
            self.board = self._open_board()
        if found and args.resume != "auto":
            self.save_recovery()  # must be newer than whatever an abandoned run left behind
        if not self.train_loader.seekable:
            LOGGER.info("%s cannot seek: checkpoints at the end of each epoch only", args.dataset)

    def _open_board(self) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            LOGGER.warning("no TensorBoard logs, only summary.csv: pip install tensorboard")
            return None
        return SummaryWriter(str(self.folder), purge_step=self.state.updates)

    def _record(self, values: dict[str, float]) -> None:
        """Log values to TensorBoard."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, self.state.updates)

    def fit(self) -> float | None:
        """Train to the end and return the best top-1 accuracy in percent (on rank 0).

        Raises:
            Preempted: Any process received SIGTERM or SIGUSR1; the state is saved.
        """
        with self.preemption:
            try:
                return self._fit()
            except Preempted:
                state, resume = self.state, "resume with --resume auto"
                if not self._can_save:
                    resume = f"{self.args.dataset} cannot seek: --resume auto repeats the epoch"
                LOGGER.info("preempted at epoch %d, batch %d; %s", state.epoch, state.batch, resume)
                raise
            finally:
                if self.board:
                    self.board.close()

    def _fit(self):
        args, state = self.args, self.state
        LOGGER.info(
            "%s: %.2f M parameters, %d epochs of %d updates, global batch %d, %s, backend %s, output in %s",
            args.model,
            sum(parameter.numel() for parameter in self.parameters) / 1e6,
            self.num_epochs,
            len(self.train_loader) // args.grad_accum_steps,
            args.batch_size * self.world.size * args.grad_accum_steps,
            f"{self.world.size} × {self.world.device.type}",
            args.backend,
            self.folder,
        )
        best = self.saver.best_metric if self.saver else None
        while state.epoch < self.num_epochs:
            lr = state.optimizer.param_groups[0]["lr"]
            train_loss = self.train_epoch()
            results = self.validate()
            epoch = state.epoch
            state.epoch, state.batch, state.loss_sum, state.images = epoch + 1, 0, 0.0, 0
            state.scheduler.step(state.epoch)
            content = state.state_dict()
            if self.saver:
                self._record({"train/loss": train_loss, "train/lr": lr, **results})
                flat = {name.replace("/", "_"): value for name, value in results.items()}
                update_summary(epoch, {"loss": train_loss}, flat, str(self.folder / "summary.csv"), lr=lr)
                top1 = results["ema/top1" if state.ema else "raw/top1"]
                best = self.saver.save_epoch(content, epoch, top1)
                LOGGER.info("epoch %d: train_loss %.4g, %s, best %.4g", epoch, train_loss, _line(flat), best)
        return best

    def train_epoch(self) -> float:
        """Train the rest of the current epoch and return its mean loss over all processes."""
        args, state, world, loader = self.args, self.state, self.world, self.train_loader
        self.net.train()
        total, accum = len(loader), args.grad_accum_steps
        loader.seek(state.epoch, state.batch)
        batches = islice(loader, total - state.batch) if state.batch < total else ()
        bar = tqdm(
            total=total,
            initial=state.batch,
            desc=f"epoch {state.epoch}",
            disable=None if world.primary else True,
            leave=False,
        )
        seen, data_s, since = 0, 0.0, time.perf_counter()
        ready = since
        for images, labels in batches:
            data_s += time.perf_counter() - ready
            last = (state.batch + 1) % accum == 0
            loss = self.train_step(images, labels, last)
            state.batch += 1
            state.loss_sum += loss * len(labels)
            state.images += len(labels)
            seen += len(labels) * world.size
            bar.update()
            ready = time.perf_counter()
            if not last:
                continue
            state.updates += 1
            done = state.batch // accum
            if done % args.log_interval == 0 or state.batch == total:
                self._log_step(bar, loss, seen / (ready - since), data_s / (ready - since))
                seen, data_s, since = 0, 0.0, ready
            if self.preempted:
                break
            interval = args.recovery_interval
            if self._can_save and interval and done % interval == 0 and state.batch < total:
                self.save_recovery()
        else:
            state.batch = total
        bar.close()
        state.optimizer.zero_grad()
        if self._can_save:
            self.save_recovery()
        if self.preempted:
            raise Preempted
        totals = torch.tensor([state.loss_sum, state.images], dtype=torch.float64, device=world.device)
        if world.distributed:
            dist.all_reduce(totals)
        return (totals[0] / totals[1]).item()

    def _log_step(self, bar: tqdm, loss: float, images_per_s: float, data_share: float) -> None:
        """Log the last update to the progress bar or the log, and to TensorBoard."""
        state = self.state
        values = {
            "loss": loss,
            "lr": state.optimizer.param_groups[0]["lr"],
            "images_per_s": images_per_s,
            "data_percent": 100 * data_share,
            "memory_mib": peak_memory_mib(self.world.device),
        }
        values = {key: value for key, value in values.items() if value is not None}
        if not self.world.primary:
            return
        bar.set_postfix_str(_line(values))
        if bar.disable:
            LOGGER.info("epoch %d: batch %d/%d, %s", state.epoch, state.batch, bar.total, _line(values))
        self._record({f"step/{key}": value for key, value in values.items()})

    def train_step(self, images: Tensor, labels: Tensor, update: bool) -> float:
        """Accumulate the gradients of a batch, and update the weights and their EMA if ``update``.

        Args:
            images: ``[B, 3, H, W]``, normalised, on the device.
            labels: ``[B]``.
            update: Whether this batch completes an update.

        Returns:
            The mean loss of the batch.

        Raises:
            UserError: The loss is not finite.
        """
        args, state = self.args, self.state
        if self.mixup:
            images, labels = self.mixup(images, labels)
        if self.erase:  # after mixing, as in timm 0.3.4's loader, used by CSWin's recipe
            images = self.erase(images)
        with nullcontext() if update else self.no_sync():
            with self.autocast:
                loss = self.compute_loss(images.contiguous(memory_format=self.memory_format), labels)
            value = loss.item()
            # here, as item() has just waited for the GPU
            flags = not math.isfinite(value), update and self.preemption.requested
            failed, self.preempted = any_process(self.world.device, *flags)
            if failed:
                self._stop(value, images, labels)
            loss = loss / args.grad_accum_steps
            if state.scaler:
                state.scaler(loss, state.optimizer, args.clip_grad, parameters=self.parameters, need_update=update)
            else:
                loss.backward()
        if update:
            if not state.scaler:
                if args.clip_grad is not None:
                    dispatch_clip_grad(self.parameters, args.clip_grad)
                state.optimizer.step()
            state.optimizer.zero_grad()
            if state.ema:
                state.ema.update(self.model)
        return value

    def compute_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of an augmented batch."""
        return self.loss(self.net(images), labels)

    def _stop(self, loss: float, images: Tensor, labels: Tensor) -> None:
        """Save the state and each batch with a non-finite loss, and stop the run; every process must call it."""
        args, state, rank = self.args, self.state, self.world.rank
        place = f"epoch {state.epoch}, batch {state.batch}, update {state.updates}"
        state.batch -= state.batch % args.grad_accum_steps  # the gradients of the others are not saved
        path, content = self.folder / "nan.pth.tar", state.state_dict()
        if self.saver:
            self.saver.save_as(content, state.epoch, path)
        if math.isfinite(loss):
            raise UserError(f"the loss of another process is not finite at {place}")
        write({"images": images.detach(), "labels": labels}, self.folder / f"nan-batch-rank{rank}.pth.tar")
        lr = state.optimizer.param_groups[0]["lr"]
        remedy = "start a new run (--experiment) with a lower --lr"
        if self.train_loader.seekable and all(parameter.isfinite().all() for parameter in self.parameters):
            options = ["--clip-grad 1" if args.clip_grad is None else f"a --clip-grad below {args.clip_grad}"]
            options = ["--amp-dtype bfloat16", *options] if state.scaler else options
            remedy = f"pass --resume {path} with {' or '.join(options)}, or {remedy}"
        raise UserError(
            f"the loss is {loss} at {place}, learning rate {lr:.3g}; the state before it was saved to {path}, the "
            f"batch to nan-batch-rank{rank}.pth.tar: {remedy}"
        )

    @property
    def _can_save(self) -> bool:
        """Whether a run could resume here: an iterable reader has no positions inside an epoch."""
        return self.train_loader.seekable or self.state.batch == len(self.train_loader)

    def save_recovery(self) -> None:
        """Save the mid-epoch state; every process must call it."""
        content = self.state.state_dict()
        if self.saver:
            self.saver.save_recovery(content, self.state.epoch)

    def validate(self) -> dict[str, float]:
        """Evaluate the raw and EMA weights: ``{"raw/top1": …, "ema/top1": …}``."""
        results = {}
        for name, model in self.evaluated.items():
            if self.world.distributed:
                distribute_bn(model, self.world.size)  # batch norm statistics differ between processes
            self.val_loader.seek(0)
            scores = evaluate(
                *(model, self.val_loader, self.world, self.autocast, self.args.channels_last, name, self.preemption)
            )
            results |= {f"{name}/{key}": scores[key] for key in ("top1", "top5", "loss")}
        return results


def _line(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _warn_of_other_classes(report: LoadReport, classes: dict[str, int] | None) -> None:
    """Warn if the initial classifier was trained on other classes: it works, but starts from meaningless rows."""
    if any(name.startswith("head.") for name in report.skipped) or not (classes and report.class_to_idx):
        return
    if difference := mismatch(classes, report.class_to_idx):
        LOGGER.warning("the classifier starts from other classes: %s", difference)


def main(argv: list[str] | None = None) -> int:
    """Train a model and return the exit code."""
    return run_main("train.py", lambda: Trainer(parse_args(argv, train=True)).fit())


if __name__ == "__main__":
    sys.exit(main())
