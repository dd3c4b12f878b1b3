"""What `train.py` and `validate.py` share before the first image: processes, device, logging, the model."""

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
from elfatt.conversion import Plan
from elfatt.data import UserError
from elfatt.data.resources import exhausted
from elfatt.ops import set_default_backend
from elfatt.processes import leave_process_group

LOGGER = logging.getLogger("classification")


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.size > 1

    @property
    def primary(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0


def init_world(device: str | None, backend: str) -> World:
    """Joins the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), sets up logging and the backend.

    Raises:
        UserError: The device is not there, or the backend cannot run on it.
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
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)  # prints a table every epoch
    torch.backends.cudnn.benchmark = True
    try:
        set_default_backend(backend, world.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    return world


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Returns the mixed-precision context that the options ask for."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def build_model(args: argparse.Namespace, **kwargs) -> nn.Module:
    """Creates the model that the options name, on the CPU, with the attention of `args.plan`.

    Args:
        args: Parsed options.
        **kwargs: Further model keywords; a value of None is left out.

    Raises:
        UserError: The model refuses a keyword, a value or the plan.
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
    """Reads a plan.

    Raises:
        UserError: The file is missing or holds none.
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
            kwargs.pop("img_size")  # convolutional models have no tables that depend on the input size
            return timm.create_model(args.model, **kwargs)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if value is not None)
        raise UserError(f"model {args.model} cannot be built with {given}: {error}") from error


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory so far: of the GPU, or of this process where there is none; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def load_weights(model: nn.Module, path: str, use_ema: bool, allow: Sequence[str] = ()) -> LoadReport:
    """Loads a checkpoint's weights, all of them or none.

    Args:
        model: Takes the weights.
        path: Checkpoint.
        use_ema: Take the averaged weights where the file has them.
        allow: Prefixes of tensors that the file may lack (`--allow-mismatch` in `train.py`).

    Raises:
        UserError: The file is missing or holds another model's weights.
    """
    try:
        return load_checkpoint(model, path, use_ema=use_ema, allow=tuple(allow))
    except (FileNotFoundError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load {path} into {type(model).__name__}: {reason}") from error


def run_main(program: str, run: Callable[[], None]) -> int:
    """Runs a program; a user's mistake or a full machine becomes one line on stderr and exit code 1."""
    try:
        run()
    except (UserError, OSError, RuntimeError) as error:
        message = error if isinstance(error, UserError) else exhausted(error)
        if not message:
            raise
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        return 1
    leave_process_group()  # not after an error: the other processes may wait in a collective
    return 0
