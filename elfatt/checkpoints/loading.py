"""Read a checkpoint, check it against a model, then load it."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import torch
from torch import nn

from elfatt.backbones import list_models
from elfatt.checkpoints.names import CROPS, POSITIONS, Crop, StateDict, convert_state_dict
from elfatt.layers import resize_positions

LOGGER = logging.getLogger(__name__)
CONTAINERS = {"ema": ("state_dict_ema", "model_ema", "ema_state_dict"), "raw": ("state_dict", "model")}

# extras in trainers' checkpoints: timm's arguments, NumPy 1 and 2 scalars and arrays, open-mmlab's log buffers, whose
# methods are pickled through getattr
IGNORED = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("_core", "core") for name in ("scalar", "_reconstruct")),
)

AVERAGED_ONLY = "{} has only averaged weights: load it with use_ema=True"
REMEDIES = (  # by the pattern that all rejected tensors match
    (
        r"head\.",
        "use the checkpoint's num_classes (--num-classes), or reinitialise the classifier with allow=('head.',)",
    ),
    (
        r"(head|norm)\.",
        "dense models' checkpoints have no classifier: reinitialise it with allow=('head.', 'norm.')",
    ),
    (r".*\.relative_position_bias_table \[", "its last axis is the number of heads: set the checkpoint's num_heads"),
    (
        "",
        "build the model that the checkpoint was trained with, list the prefixes to skip in allow, or inspect every "
        "tensor with python -m elfatt.checkpoints",
    ),
)


@dataclass(frozen=True)
class LoadReport:
    """Result of ``load_checkpoint``.

    Attributes:
        source: Source of the weights, from their names or as recorded by ``python -m elfatt.checkpoints``; ``native``
            for the model's own names.
        weights: ``ema`` or ``raw``.
        matched: Number of tensors loaded, including resized ones.
        resized: Position tables interpolated to the model's size.
        skipped: Tensors that did not fit, as permitted by ``allow``.
        left_over: The file's names of other parts' tensors, such as a dense model's heads.
        class_to_idx: Class labels from training, if the file has them.
        model_kwargs: Keyword arguments of the trained model, if the file has them.
    """

    source: str
    weights: str
    matched: int
    resized: tuple[str, ...]
    skipped: tuple[str, ...]
    left_over: tuple[str, ...] = ()
    class_to_idx: dict[str, int] | None = None
    model_kwargs: dict[str, Any] | None = None

    def other_options(self, given: Mapping[str, Any]) -> str | None:
        """Return a warning if the model was trained with other keyword arguments than these."""
        if self.model_kwargs is None or self.model_kwargs == dict(given):
            return None
        options = " ".join(f"{name}={value}" for name, value in self.model_kwargs.items())
        remedy = f"pass {options}" if options else f"omit {' '.join(given)}"
        return f"the checkpoint was trained with other model options: {remedy}"


def published_crop(source: str, side: int) -> Crop | None:
    """Return the crop behind a source's published accuracies at an image side in pixels, or None."""
    return CROPS.get(source, {}).get(side)


def load_checkpoint(
    model: nn.Module, path: str | Path, *, use_ema: bool = True, allow: Sequence[str] = ()
) -> LoadReport:
    """Load a checkpoint into one of our models, or into any other model with matching names.

    The file may contain more than the model, e.g. a detector with it as backbone; see ``convert_state_dict``. Position
    tables of another resolution are interpolated as in the official code, assuming square maps for token tables. The
    model is unchanged if this raises.

    Args:
        model: Target model.
        path: ``.safetensors`` or ``torch.save`` file with only tensors, numbers and plain containers.
        use_ema: Prefer averaged weights if the file has them.
        allow: Prefixes of the model's tensor names that may be missing, unexpected or mismatched, e.g. ``("head.",)``
            for another number of classes; ``"arch"`` permits a checkpoint of another of our models.

    Raises:
        FileNotFoundError: No such file.
        TypeError: ``allow`` is a string.
        ValueError: The file has no tensors or contains other objects, or its tensors do not fit the model.
    """
    if isinstance(allow, str):
        raise TypeError(f"allow={allow!r} must be a sequence of prefixes: ({allow!r},)")
    checkpoint = read_checkpoint(path, model, use_ema=use_ema, allow=allow)
    origin = f"{checkpoint.names} names, {checkpoint.weights} weights"
    fit = fit_tensors(checkpoint.tensors, model)
    refused = fit.misfits(allow)
    if any(refused.values()):
        names = [name for group in refused.values() for name in group]
        remedy = next(remedy for pattern, remedy in REMEDIES if all(re.match(pattern, name) for name in names))
        found = _summary(refused)
        raise ValueError(f"{path} ({origin}) does not fit {type(model).__name__}: {found}; {remedy}")

    broken = [name for name, x in fit.tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if broken:
        found = _summary({"non-finite tensors": broken})
        raise ValueError(f"{path} ({origin}) has {found}: take an earlier checkpoint")
    model.load_state_dict(fit.tensors, strict=False)  # checked above, before the model changes
    skipped = (*fit.missing, *fit.unexpected, *fit.mismatched)
    groups = {"resized": tuple(fit.resized), "skipped": skipped, "from other parts": checkpoint.left_over}
    changes = _summary(groups) or "none resized, none skipped"
    LOGGER.info("%s: %s, %d tensors matched, %s", path, origin, len(fit.tensors), changes)
    return LoadReport(
        checkpoint.source,
        checkpoint.weights,
        len(fit.tensors),
        tuple(fit.resized),
        skipped,
        checkpoint.left_over,
        checkpoint.class_to_idx,
        checkpoint.model_kwargs,
    )


@dataclass(frozen=True)
class Fit:
    """How tensors fit a model; all names are the model's.

    Attributes:
        tensors: Tensors that fit, resized if needed.
        resized: Interpolated position tables, with their shapes in the file.
        missing: The model's tensors not in the file, with their shapes.
        unexpected: Tensors that the model does not have, with their shapes.
        mismatched: Tensors of another shape, with both shapes.
    """

    tensors: StateDict
    resized: dict[str, str]
    missing: dict[str, str]
    unexpected: dict[str, str]
    mismatched: dict[str, str]

    def misfits(self, allow: Sequence[str] = ()) -> dict[str, list[str]]:
        """Return the tensors that do not fit, by kind, except those with an allowed prefix."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "mismatched": self.mismatched}
        return {
            kind: [
                f"{name} {shapes}" if kind == "mismatched" else name
                for name, shapes in group.items()
                if not name.startswith(tuple(allow))
            ]
            for kind, group in kinds.items()
        }


def fit_tensors(tensors: StateDict, model: nn.Module) -> Fit:
    """Compare tensors with a model, by the model's names; the model is not changed."""
    own = model.state_dict()
    sized = {key: _resize(key, tensor, model, own[key]) for key, tensor in tensors.items() if key in own}
    fitting = {key: tensor for key, tensor in sized.items() if tensor.shape == own[key].shape}
    shapes = {key: str(list(tensor.shape)) for key, tensor in tensors.items()}
    return Fit(
        tensors=fitting,
        resized={key: shapes[key] for key, tensor in fitting.items() if tensor is not tensors[key]},
        missing={key: str(list(tensor.shape)) for key, tensor in own.items() if key not in tensors},
        unexpected={key: shapes[key] for key in tensors if key not in own},
        mismatched={key: f"{shapes[key]} for {list(own[key].shape)}" for key in sized if key not in fitting},
    )


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint file, under a model's names.

    Attributes:
        tensors: Tensors by the model's names.
        origins: The tensors' names in the file.
        left_over: The file's names of other parts' tensors.
        names: Source of the file's names.
        source: Source of the weights, as in ``LoadReport``.
        weights: ``ema`` or ``raw``.
        class_to_idx: Class labels, as in ``LoadReport``.
        model_kwargs: Model options, as in ``LoadReport``.
    """

    tensors: StateDict
    origins: dict[str, str]
    left_over: tuple[str, ...]
    names: str
    source: str
    weights: str
    class_to_idx: dict[str, int] | None
    model_kwargs: dict[str, Any] | None


def read_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    use_ema: bool = True,
    allow: Sequence[str] = (),
    renames: Sequence[tuple[str, str]] = (),
) -> Checkpoint:
    """Read a file and rename its tensors; see ``load_checkpoint`` and ``convert_state_dict``."""
    content: Any = _read(Path(path))  # a dict, or _unwrap raises
    tensors, weights = _unwrap(content, use_ema, path)
    _check_architecture(content, model, path, allow)
    converted = convert_state_dict(tensors, model, renames, use_ema=use_ema)
    if converted.averaged and not use_ema:
        raise ValueError(AVERAGED_ONLY.format(path))
    noted = str(content.get("source"))
    return Checkpoint(
        converted.tensors,
        converted.origins,
        converted.left_over,
        names=converted.source,
        source=noted if noted in CROPS else converted.source,
        weights="ema" if converted.averaged else weights,
        class_to_idx=_labels(content.get("class_to_idx")),
        model_kwargs=_model_kwargs(content.get("args")),
    )


def _model_kwargs(args: object) -> dict[str, Any] | None:
    """Return the model's options among those of a run of ``train.py``; None for anything else."""
    options = args.get("model_kwargs") if isinstance(args, dict) else None
    return options if isinstance(options, dict) else None


def _labels(classes: object) -> dict[str, int] | None:
    """Return class labels in torchvision's and timm's format; None for anything else."""
    if isinstance(classes, dict) and all(isinstance(k, str) and isinstance(v, int) for k, v in classes.items()):
        return classes
    return None


class _Ignored:
    """Placeholder for unneeded objects of known types in a pickle."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # not a mapping
                notes = file.metadata() or {}
                classes = json.loads(notes.get("class_to_idx", "null"))
                return {"state_dict": tensors, "source": notes.get("source"), "class_to_idx": classes}
        # Swin-style options become a dict; other allowed types become placeholders, so no code runs
        options = (OrderedDict, "yacs.config.CfgNode")
        with torch.serialization.safe_globals([options, *((_Ignored, name) for name in IGNORED)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or foreign files raise almost anything
        reason = f"is damaged or not a checkpoint ({type(error).__name__}): download or copy it again"
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            reason = (
                f"contains more than tensors ({unsafe[1]}), and loading it can run code: if you trust it, save only "
                "its tensors with torch.save({'state_dict': ...}) and load that file"
            )
        raise ValueError(f"{path} {reason}") from error


def _unwrap(content: object, use_ema: bool, path: str | Path) -> tuple[StateDict, str]:
    """Return a file's state dict, and ``ema`` or ``raw``."""
    fields = content if isinstance(content, dict) else {}
    averaged = fields.get("ema_state_dict")
    if _is_state_dict(averaged) and "steps" in averaged:  # mmengine's EMAHook swaps the two on saving
        fields = {"ema_state_dict": fields.get("state_dict"), "state_dict": averaged}
    found = {
        weights: [fields[key] for key in keys if _is_state_dict(fields.get(key))]
        for weights, keys in CONTAINERS.items()
    }
    if not any(found.values()) and _is_state_dict(content):
        found["raw"] = [content]
    for weights in ("ema", "raw") if use_ema else ("raw",):
        if found[weights]:
            return found[weights][0], weights
    if found["ema"]:
        raise ValueError(AVERAGED_ONLY.format(path))
    wanted = ", ".join(key for keys in CONTAINERS.values() for key in keys)
    raise ValueError(f"{path} has no tensors: it must be a state dict or contain one as {wanted}")


def _check_architecture(content: object, model: nn.Module, path: str | Path, allow: Sequence[str]) -> None:
    """Raise ``ValueError`` for a checkpoint of another of our models; some share all names and shapes."""
    saved = str(content.get("arch") if isinstance(content, dict) else None).split(".")[0]
    own = getattr(model, "pretrained_cfg", {}).get("architecture")
    if own and saved != own and saved in list_models() and "arch" not in allow:
        raise ValueError(
            f"{path} is a checkpoint of {saved}, not of {own}: build {saved}, or allow 'arch' to load it anyway"
        )


def _is_state_dict(content: object) -> TypeGuard[StateDict]:
    return isinstance(content, dict) and bool(content) and all(map(torch.is_tensor, content.values()))


def _resize(key: str, table: torch.Tensor, model: nn.Module, own: torch.Tensor) -> torch.Tensor:
    """Resize a position table to the model's size; return it as is if it fits or cannot be resized."""
    owner, _, name = key.rpartition(".")
    if name not in POSITIONS or table.shape == own.shape or table.ndim != own.ndim:
        return table
    mode, channels = POSITIONS[name]
    if own.ndim == 4:
        height, width = own.movedim(channels, 1).shape[-2:]
        maps, size = table, (height, width)
    else:  # a table of tokens
        tokens, wanted = table.shape[-2], own.shape[-2]
        side = math.isqrt(tokens)
        size = getattr(model.get_submodule(owner), "feat_size", (math.isqrt(wanted), math.isqrt(wanted)))
        if side**2 != tokens or math.prod(size) != wanted:
            return table
        maps = table.reshape(1, side, side, -1)
    maps = resize_positions(maps.movedim(channels, 1), size, mode).movedim(1, channels)
    return maps.reshape(own.shape) if maps.numel() == own.numel() else table


def _summary(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the size and first names of each non-empty group."""
    return ", ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for what, names in groups.items()
        if names
    )
