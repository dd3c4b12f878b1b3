"""Reading a checkpoint, checking it against a model, and only then loading it."""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from elfatt.checkpoints.names import POSITIONS, StateDict, convert_state_dict
from elfatt.layers import resize_positions

LOGGER = logging.getLogger(__name__)
CONTAINERS = {"ema": ("state_dict_ema", "model_ema"), "raw": ("state_dict", "model")}


@dataclass(frozen=True)
class LoadReport:
    """What ``load_checkpoint`` did.

    Attributes:
        source: Whose names the file uses; ``native`` for the model's own.
        weights: ``ema`` or ``raw``.
        matched: Tensors loaded, resized ones included.
        resized: Position tables that were interpolated to the model's size.
        skipped: Tensors that did not fit and that the caller allowed not to.
        class_to_idx: Labels of the classes that the model was trained on, where the file tells.
    """

    source: str
    weights: str
    matched: int
    resized: tuple[str, ...]
    skipped: tuple[str, ...]
    class_to_idx: dict[str, int] | None = None


def load_checkpoint(
    model: nn.Module, path: str | Path, *, use_ema: bool = True, allow: Sequence[str] = ()
) -> LoadReport:
    """Load a checkpoint into one of our models, or into any other under the names it has itself.

    Position tables of another resolution are interpolated as their authors do. A table of tokens is taken to come from
    a square map. When it raises, the model is as it was.

    Args:
        model: The model.
        path: ``.safetensors``, or a file of ``torch.save`` that holds nothing but tensors and plain containers.
        use_ema: Take averaged weights where the file has them.
        allow: Prefixes of tensors, under the model's names, that may be missing, unexpected or of another shape, such
            as ``("head.",)`` for another number of classes; ``"arch"`` allows a file that names another model.

    Raises:
        FileNotFoundError: No such file.
        TypeError: ``allow`` is one string.
        ValueError: The file holds no such tensors or objects beyond them, or the tensors do not fit the model.
    """
    if isinstance(allow, str):
        raise TypeError(f"allow={allow!r} must be a sequence of prefixes: ({allow!r},)")
    content = _read(Path(path))
    tensors, weights = _choose_tensors(content, model, path, use_ema, allow)
    tensors, source = convert_state_dict(tensors, model)
    origin = f"{source} names, {weights} weights"
    fit = fit_tensors(tensors, model)
    refused = fit.misfits(allow)
    if any(refused.values()):
        remedy = (
            "build the model that the checkpoint was trained with, name the prefixes to skip in allow, or let "
            "python -m elfatt.checkpoints list every tensor"
        )
        if all(key.startswith("head.") for keys in refused.values() for key in keys):
            remedy = "set the checkpoint's num_classes, or start the classifier anew with allow=('head.',)"
        found = _summary(refused)
        raise ValueError(f"{path} ({origin}) does not fit {type(model).__name__}: {found}; {remedy}")

    model.load_state_dict(fit.tensors, strict=False)  # strictness is checked above, before anything changes
    skipped = (*fit.missing, *fit.unexpected, *fit.mismatched)
    changes = _summary({"resized": tuple(fit.resized), "skipped": skipped}) or "none resized, none skipped"
    LOGGER.info("%s: %s, %d tensors matched, %s", path, origin, len(fit.tensors), changes)
    classes = content.get("class_to_idx")
    return LoadReport(source, weights, len(fit.tensors), tuple(fit.resized), skipped, classes)


@dataclass(frozen=True)
class Fit:
    """How tensors fit a model; all names are the model's.

    Attributes:
        tensors: Those that have a place and its shape, resized where that is allowed.
        resized: Of these, the position tables that were interpolated; each with its shape in the file.
        missing: Names that nothing is there for.
        unexpected: Names that the model does not have; each with its shape.
        mismatched: Names whose shape is another one; each with both shapes.
    """

    tensors: StateDict
    resized: dict[str, str]
    missing: dict[str, str]
    unexpected: dict[str, str]
    mismatched: dict[str, str]

    def misfits(self, allow: Sequence[str] = ()) -> dict[str, list[str]]:
        """What does not fit, by kind and in words, but for names with an allowed prefix."""
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
    """Compare tensors, under the model's names, with the model, which stays as it is."""
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


def read_tensors(
    path: str | Path, model: nn.Module, *, use_ema: bool = True, allow: Sequence[str] = ()
) -> tuple[StateDict, str]:
    """The tensors of a checkpoint under their own names, and whether they are ``ema`` or ``raw``.

    Args and errors as in ``load_checkpoint``.
    """
    return _choose_tensors(_read(Path(path)), model, path, use_ema, allow)


def _choose_tensors(content, model, path, use_ema, allow):
    tensors, weights = _unwrap(content, use_ema, path)
    _check_architecture(content, model, path, allow)
    return tensors, weights


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist, or is no file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # arguments of timm's training script, and options of Swin's and its descendants' read as what they are: no code
        options = (OrderedDict, "yacs.config.CfgNode")
        with torch.serialization.safe_globals([argparse.Namespace, options]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign files fail in many ways
        reason = f"is damaged or no checkpoint ({type(error).__name__}): download or copy it again"
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            reason = (
                f"holds more than tensors ({unsafe[1]}), and reading that can run code: if you trust it, save its "
                "tensors alone with torch.save({'state_dict': ...}) and load that file"
            )
        raise ValueError(f"{path} {reason}") from error


def _unwrap(content: object, use_ema: bool, path: str | Path) -> tuple[StateDict, str]:
    """The state dict in a file, and whether it is ``ema`` or ``raw``."""
    fields = content if isinstance(content, dict) else {}
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
        raise ValueError(f"{path} holds averaged weights only: load it with use_ema=True")
    wanted = ", ".join(key for keys in CONTAINERS.values() for key in keys)
    raise ValueError(f"{path} holds no tensors: it must be a state dict, or have one under {wanted}")


def _check_architecture(content: object, model: nn.Module, path: str | Path, allow: Sequence[str]) -> None:
    """Raise for a training checkpoint of another model: some models share all names and shapes."""
    saved = content.get("arch") if isinstance(content, dict) else None
    own = getattr(model, "pretrained_cfg", {}).get("architecture")
    if saved and own and saved.split(".")[0] != own and "arch" not in allow:
        raise ValueError(
            f"{path} is a checkpoint of {saved}, not of {own}: build {saved}, or allow 'arch' to load it all the same"
        )


def _is_state_dict(content: object) -> bool:
    return isinstance(content, dict) and bool(content) and all(map(torch.is_tensor, content.values()))


def _resize(key: str, table: torch.Tensor, model: nn.Module, own: torch.Tensor) -> torch.Tensor:
    """A position table at the size of the model's; itself where it has that size or cannot be given it."""
    owner, _, name = key.rpartition(".")
    if name not in POSITIONS or table.shape == own.shape or table.ndim != own.ndim:
        return table
    mode, channels = POSITIONS[name]
    if own.ndim == 4:
        maps, size = table, own.movedim(channels, 1).shape[-2:]
    else:  # tokens of a map
        tokens, wanted = table.shape[-2], own.shape[-2]
        side = math.isqrt(tokens)
        size = getattr(model.get_submodule(owner), "feat_size", 2 * (math.isqrt(wanted),))
        if side**2 != tokens or math.prod(size) != wanted:
            return table
        maps = table.reshape(1, side, side, -1)
    maps = resize_positions(maps.movedim(channels, 1), size, mode).movedim(1, channels)
    return maps.reshape(own.shape) if maps.numel() == own.numel() else table


def _summary(groups: dict[str, Sequence[str]]) -> str:
    """Size and first names of each group that is not empty."""
    return ", ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for what, names in groups.items()
        if names
    )
