"""Setup shared by ``train.py`` and ``validate.py``: processes, device, logging and model."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

import timm
import torch
from timm.utils.distributed import init_distributed_device_so
from torch import nn

import elfatt
from elfatt.checkpoints import LoadReport, load_checkpoint
from elfatt.console import replace_unprintable
from elfatt.conversion import Plan
from elfatt.data import UserError
from elfatt.data.resources import exhausted
from elfatt.ops import set_default_backend
from elfatt.preemption import EXIT_CODE, Preempted
from elfatt.processes import leave_process_group

LOGGER = logging.getLogger("classification")


@dataclass(frozen=True)
class World:
    """Device and rank of this process, and number of processes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    @property
    def primary(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0


def init_world(device: str | None, backend: str) -> World:
    """Join torchrun's process group (NCCL on GPUs, Gloo on CPUs) and set up logging and the backend.

    Raises:
        UserError: The device is not available, or the backend does not support it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no GPU; pass --device cpu or install a CUDA build")
    try:
        info = init_distributed_device_so(device)
        torch.empty(0, device=info["device"])
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {device} cannot be used ({reason}): pass --device cpu or cuda") from error
    world = World(torch.device(info["device"]), info["global_rank"], info["world_size"])
    logging.basicConfig(
        level=logging.INFO if world.primary else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)  # it prints a table every epoch
    torch.backends.cudnn.benchmark = True
    try:
        set_default_backend(backend, world.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    return world


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Return the autocast context for the options."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def build_model(args: argparse.Namespace, **kwargs) -> nn.Module:
    """Build the model on the CPU and apply the attention plan ``args.plan``.

    Args:
        args: Parsed options.
        **kwargs: Further keyword arguments of the model; None values are dropped.

    Raises:
        UserError: The model rejects a keyword argument, a value or the plan.
    """
    model = _create_model(args, **kwargs)
    if args.plan:
        plan = read_plan(args.plan)
        try:
            elfatt.convert(model, plan)
        except (TypeError, ValueError) as error:
            raise UserError(f"--plan {args.plan} does not fit {args.model}: {error}") from error
    return model


def read_plan(path: str) -> Plan:
    """Load a plan.

    Raises:
        UserError: The file is missing or not a plan.
    """
    try:
        return Plan.from_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--plan {path} cannot be read ({error}): write one with classification/calibrate.py"
        ) from error


def _create_model(args, **kwargs):
    kwargs = {"num_classes": args.num_classes, "img_size": args.img_size, **kwargs, **args.model_kwargs}
    try:
        try:
            return timm.create_model(args.model, **kwargs)
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" in args.model_kwargs:
                raise
            kwargs.pop("img_size")  # convolutional models have no size-dependent tables
            return timm.create_model(args.model, **kwargs)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if value is not None)
        raise UserError(f"model {args.model} cannot be built with {given}: {error}") from error


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB of the GPU, or of this process on CPU; None if not available."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def load_weights(model: nn.Module, path: str, use_ema: bool, allow: Sequence[str] = ()) -> LoadReport:
    """Load a checkpoint's weights, all or nothing.

    Args:
        model: Model to load into.
        path: Checkpoint.
        use_ema: Load the EMA weights if present.
        allow: Prefixes of tensors that need not match (``--allow-mismatch`` of ``train.py``).

    Raises:
        UserError: The file is missing or its weights do not fit the model.
    """
    try:
        return load_checkpoint(model, path, use_ema=use_ema, allow=tuple(allow))
    except (FileNotFoundError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load {path} into {type(model).__name__}: {reason}") from error


def run_main(program: str, run: Callable[[], None]) -> int:
    """Run a program; report user errors and exhausted resources in one line on stderr, with exit code 1.

    A preempted run has exit code 143.
    """
    replace_unprintable()
    code = 0
    try:
        run()
    except Preempted:
        code = EXIT_CODE
    except (UserError, OSError, RuntimeError) as error:
        message = error if isinstance(error, UserError) else exhausted(error)
        if not message:
            raise
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        return 1
    leave_process_group()  # not after an error: other processes may be waiting in a collective
    return code
