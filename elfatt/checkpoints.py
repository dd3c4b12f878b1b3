"""Checkpoints of our models and of the official ones: recognised, renamed, checked, and only then loaded.

Names follow microsoft/Swin-Transformer (swin_transformer.py), microsoft/CSWin-Transformer (cswin.py),
LeapLabTHU/FLatten-Transformer (flatten_swin.py, flatten_cswin.py), LeapLabTHU/Agent-Attention (agent_swin.py,
agent_cswin.py) and timm (swin_transformer.py). Another one is another row of ``NAMINGS``.

Microsoft's CSWin-T and -B have other depths than this paper's: build ours with ``depths=(1, 2, 21, 1)`` or
``(2, 4, 32, 2)`` for their weights.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import nn

from elfatt.layers import resize_positions

LOGGER = logging.getLogger(__name__)
StateDict = dict[str, torch.Tensor]

CONTAINERS = {"ema": ("state_dict_ema", "model_ema"), "raw": ("state_dict", "model")}
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # left by DistributedDataParallel and torch.compile
DERIVED = (".relative_position_index", ".attn_mask")  # buffers that models compute and old checkpoints hold


class Naming(NamedTuple):
    """How a source names our tensors.

    Attributes:
        source: Its name for people.
        marks: Regular expressions that each match some key of it.
        rules: Regular expressions and their replacements, applied to every key in this order.
    """

    source: str
    marks: tuple[str, ...]
    rules: tuple[tuple[str, str | Callable[[re.Match], str]], ...]


def _stage(template: str, shift: int) -> Callable[[re.Match], str]:
    """Replacement that counts the stage in group 1 from elsewhere."""
    return lambda match: template.format(int(match[1]) + shift)


TIMM_SWIN = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^layers\.(\d+)\.", r"stages.\1."),
)
SWIN = (
    # a merge ends the stage before it, ours opens the stage behind it
    (r"^layers\.(\d+)\.downsample\.", _stage("stages.{}.downsample.", 1)),
    *TIMM_SWIN,
    (r"^head\.(?=weight$|bias$)", "head.fc."),
)
CSWIN = (
    (r"^stage1_conv_embed\.0\.", "stem.conv."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge(\d+)\.", r"stages.\1.downsample."),
    (r"^stage(\d+)\.(?=\d)", _stage("stages.{}.blocks.", -1)),
    (r"^(stages\.\d+\.blocks\.\d+)\.(?=qkv\.|proj\.)", r"\1.attn."),
    (r"\.attns\.0\.get_v\.", ".attn.lepe_vertical."),
    (r"\.attns\.1\.get_v\.", ".attn.lepe_horizontal."),
    (r"\.attns\.get_v\.", ".attn.lepe."),
    (r"\.attns\.(?=\D)", ".attn."),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
)
_SWIN, _CSWIN = r"^layers\.0\.downsample\.", r"^stage1_conv_embed\."
_AGENT, _FLATTEN = r"\.an_bias$", r"\.positional_encoding$"

# the first row whose marks are all found counts
NAMINGS = (
    Naming("Agent-Swin", (_SWIN, _AGENT), (*SWIN, (r"\.attn\.dwc\.", ".attn.lepe."))),
    Naming("Agent-CSWin", (_CSWIN, _AGENT), CSWIN),
    Naming("FLatten-Swin", (_SWIN, _FLATTEN), SWIN),
    Naming("FLatten-CSWin", (_CSWIN, _FLATTEN), CSWIN),
    Naming("microsoft Swin", (_SWIN,), SWIN),
    Naming("microsoft CSWin", (_CSWIN,), CSWIN),
    Naming("timm Swin", (r"^layers\.1\.downsample\.",), TIMM_SWIN),
)

# learned position tables: interpolation, and the axis of the channels once the table is maps of four axes
POSITIONS = {
    "relative_position_bias_table": ("bicubic", 3),
    "positional_encoding": ("bicubic", 3),
    "ah_bias": ("bilinear", 1),
    "aw_bias": ("bilinear", 1),
    "ha_bias": ("bilinear", 3),
    "wa_bias": ("bilinear", 3),
}


@dataclass(frozen=True)
class LoadReport:
    """What ``load_checkpoint`` did.

    Attributes:
        source: Whose names the file uses; ``native`` for the model's own.
        weights: ``ema`` or ``raw``.
        matched: Tensors loaded, resized ones included.
        resized: Position tables that were interpolated to the model's size.
        skipped: Tensors that did not fit and that the caller allowed not to.
    """

    source: str
    weights: str
    matched: int
    resized: tuple[str, ...]
    skipped: tuple[str, ...]


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
    tensors, weights = _unwrap(content, use_ema, path)
    _check_architecture(content, model, path, allow)
    tensors, source = convert_state_dict(tensors, model)
    origin = f"{source} names, {weights} weights"
    own = model.state_dict()
    fitted = {key: _resize(key, tensor, model, own[key]) for key, tensor in tensors.items() if key in own}
    misfits = {
        "missing": [key for key in own if key not in tensors],
        "unexpected": [key for key in tensors if key not in own],
        "mismatched": [key for key, tensor in fitted.items() if tensor.shape != own[key].shape],
    }
    refused = {what: [key for key in keys if not key.startswith(tuple(allow))] for what, keys in misfits.items()}
    if any(refused.values()):
        remedy = "build the model that the checkpoint was trained with, or name the prefixes to skip in allow"
        if all(key.startswith("head.") for keys in refused.values() for key in keys):
            remedy = "set the checkpoint's num_classes, or start the classifier anew with allow=('head.',)"
        refused["mismatched"] = [
            f"{key} {list(tensors[key].shape)} for {list(own[key].shape)}" for key in refused["mismatched"]
        ]
        found = _summary(refused)
        raise ValueError(f"{path} ({origin}) does not fit {type(model).__name__}: {found}; {remedy}")

    loaded = {key: tensor for key, tensor in fitted.items() if key not in misfits["mismatched"]}
    model.load_state_dict(loaded, strict=False)  # strictness is checked above, before anything changes
    resized = tuple(key for key, tensor in loaded.items() if tensor is not tensors[key])
    skipped = tuple(key for keys in misfits.values() for key in keys)
    changes = _summary({"resized": resized, "skipped": skipped}) or "none resized, none skipped"
    LOGGER.info("%s: %s, %d tensors matched, %s", path, origin, len(loaded), changes)
    return LoadReport(source, weights, len(loaded), resized, skipped)


def convert_state_dict(state_dict: StateDict, model: nn.Module) -> tuple[StateDict, str]:
    """Rename a checkpoint's tensors to a model's names.

    Wrappers' prefixes and buffers that the model computes itself are dropped; a key no rule knows stays as it is.

    Args:
        state_dict: The checkpoint's tensors by name.
        model: The model they are meant for.

    Returns:
        The same tensors under the new names, and whose names they had.

    Raises:
        ValueError: Two tensors end up under one name.
    """
    own = model.state_dict().keys()
    old = {key: WRAPPERS.sub("", key) for key in state_dict}
    old = {key: name for key, name in old.items() if name in own or not name.endswith(DERIVED)}
    foreign = [name for name in old.values() if name not in own]
    naming = next(
        (n for n in NAMINGS if all(any(re.search(mark, name) for name in foreign) for mark in n.marks)),
        Naming("native", (), ()),
    )
    # CSWin counts the branches of a block even where there is only one, and that one is another mechanism
    paired = {name.partition(".attns.1.")[0] for name in foreign if ".attns.1." in name}
    converted: StateDict = {}
    for key, name in old.items():
        if naming.rules and name.partition(".attns.0.")[0] not in paired:
            name = name.replace(".attns.0.", ".attns.")
        for pattern, replacement in naming.rules:
            name = re.sub(pattern, replacement, name)
        if name in converted:
            raise ValueError(f"two tensors of the checkpoint are called {name}: {key} is one of them")
        tensor = state_dict[key]
        # Agent's biases have a leading axis of one, with which they could not be channels-last
        converted[name] = tensor[0] if tensor.ndim == 5 and name.endswith(tuple(POSITIONS)) else tensor
    return converted, naming.source


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist, or is no file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # timm's training script stores its arguments as a Namespace, which runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
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
