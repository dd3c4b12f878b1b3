"""Detect a checkpoint's naming scheme and rename its tensors.

Names follow microsoft/Swin-Transformer (swin_transformer.py), microsoft/CSWin-Transformer (cswin.py),
LeapLabTHU/FLatten-Transformer (flatten_swin.py, flatten_cswin.py), LeapLabTHU/Agent-Attention (agent_swin.py,
agent_cswin.py), MzeroMiko/VMamba (vmamba.py), facebookresearch/ConvNeXt (convnext.py, for timm's model), timm
(swin_transformer.py) and open-mmlab's mmdetection, mmsegmentation and mmpretrain (swin.py), including the per-stage
output norms of their dense models. To support another source, add a row to ``NAMINGS``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import nn

StateDict = dict[str, torch.Tensor]

DERIVED = (".relative_position_index", ".attn_mask")  # computed buffers, still found in old checkpoints
LEVEL_NORMS = "norms."  # per-stage output norms of dense models' backbones; absent in classifiers
AVERAGED = re.compile(r"(?:^|[._])ema(?:[._]|$)")  # prefixes of averaged copies, e.g. "ema_model."


class Crop(NamedTuple):
    """Authors' evaluation crop, in timm's terms."""

    crop_pct: float
    crop_mode: str
    interpolation: str = "bicubic"


class Naming(NamedTuple):
    """Naming scheme of a source.

    Attributes:
        source: Display name.
        marks: Regular expressions that identify the scheme; each must match some key.
        rules: Regular expressions and replacements, applied to every key in order.
        crops: Crop of the published accuracies, by image side in pixels.
        values: Regular expressions on our names, and conversions of the matching tensors.
    """

    source: str
    marks: tuple[str, ...]
    rules: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    crops: Mapping[int, Crop]
    values: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...] = ()


def _stage(template: str, shift: int) -> Callable[[re.Match], str]:
    """Return a replacement that offsets the stage number in group 1."""
    return lambda match: template.format(int(match[1]) + shift)


def _corners(merged: torch.Tensor) -> torch.Tensor:
    """Reorder ``[..., 4 C]`` from ``nn.Unfold``'s channel-major order to Swin's (0, 0), (1, 0), (0, 1), (1, 1)."""
    return merged.unflatten(-1, (-1, 4)).mT[..., [0, 2, 1, 3], :].flatten(-2)


TIMM_SWIN = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^layers\.(\d+)\.", r"stages.\1."),
)
SWIN = (
    # downsampling ends a stage there, and starts the next one here
    (r"^layers\.(\d+)\.downsample\.", _stage("stages.{}.downsample.", 1)),
    *TIMM_SWIN,
    (r"^norm(\d)\.", r"norms.\1."),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
)
OPEN_MMLAB_SWIN = (
    (r"^patch_embed\.projection\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^stages\.(\d+)\.downsample\.", _stage("stages.{}.downsample.", 1)),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
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
    (r"^norm(\d)\.", _stage("norms.{}.", -1)),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
)
VMAMBA = (
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^layers\.(\d+)\.downsample\.1\.", _stage("stages.{}.downsample.conv.", 1)),
    (r"^layers\.(\d+)\.downsample\.3\.", _stage("stages.{}.downsample.norm.", 1)),
    (r"^layers\.(\d+)\.", r"stages.\1."),
    (r"(\.blocks\.\d+)\.(?:norm|ln_1)\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.(?:op|self_attention)\.", r"\1.attn."),
    (r"^classifier\.norm\.", "norm."),
    (r"^(?:classifier\.)?head\.(?=weight$|bias$)", "head.fc."),
    (r"^outnorm(\d)\.", r"norms.\1."),
)
CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(?=\d)", r"stages.\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(?=\d)", ".mlp.fc"),
    (r"^norm\.", "head.norm."),
    (r"^norm(\d)\.", r"norms.\1."),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
)
_SWIN, _CSWIN = r"^layers\.0\.downsample\.", r"^stage1_conv_embed\."
_AGENT, _FLATTEN, _OPEN_MMLAB = r"\.an_bias$", r"\.positional_encoding$", r"\.attn\.w_msa\."

# drop the leading size-1 axis of Agent's biases, which rules out channels-last
AGENT_VALUES = ((r"\.(?:ah|aw|ha|wa)_bias$", lambda bias: bias[0] if bias.ndim == 5 else bias),)
OPEN_MMLAB_VALUES = ((r"^stages\.\d+\.downsample\.", _corners),)
VMAMBA_VALUES = ((r"\.(?:in_proj|out_proj|fc1|fc2)\.weight$", lambda weight: weight.flatten(1)),)  # 1×1 convolutions

SWIN_CROPS = {
    224: Crop(0.875, "center"),
    384: Crop(1.0, "squash"),
}  # data/build.py; the 384 configs have TEST.CROP False
# LeapLabTHU's data/build.py resizes to 256×256 before cropping; only the 384 Swin configs have TEST.CROP False
LEAP_SWIN_CROPS = {224: Crop(0.875, "squash"), 384: Crop(1.0, "squash")}
LEAP_CSWIN_CROPS = {224: Crop(0.875, "squash"), 384: Crop(0.875, "squash")}
CSWIN_CROPS = {224: Crop(0.9, "center"), 384: Crop(1.0, "center")}  # models/cswin.py, default_cfgs
VMAMBA_CROPS = {224: Crop(0.875, "center")}  # classification/data/build.py; the only published size
CONVNEXT_CROPS = {224: Crop(0.875, "center"), 384: Crop(1.0, "squash")}  # datasets.py
TIMM_SWIN_CROPS = {224: Crop(0.9, "center"), 384: Crop(1.0, "center")}  # swin_transformer.py, default_cfgs

# the first row whose marks all match wins
NAMINGS = (
    Naming("VMamba", (r"\.(?:op|self_attention)\.A_logs$",), VMAMBA, VMAMBA_CROPS, VMAMBA_VALUES),
    Naming("Facebook ConvNeXt", (r"^downsample_layers\.0\.", r"\.dwconv\."), CONVNEXT, CONVNEXT_CROPS),
    Naming("Agent-Swin", (_SWIN, _AGENT), (*SWIN, (r"\.attn\.dwc\.", ".attn.lepe.")), LEAP_SWIN_CROPS, AGENT_VALUES),
    Naming("Agent-CSWin", (_CSWIN, _AGENT), CSWIN, LEAP_CSWIN_CROPS, AGENT_VALUES),
    Naming("FLatten-Swin", (_SWIN, _FLATTEN), SWIN, LEAP_SWIN_CROPS),
    Naming("FLatten-CSWin", (_CSWIN, _FLATTEN), CSWIN, LEAP_CSWIN_CROPS),
    Naming("microsoft Swin", (_SWIN,), SWIN, SWIN_CROPS),
    Naming("microsoft CSWin", (_CSWIN,), CSWIN, CSWIN_CROPS),
    *(  # mmpretrain's classifier has only norm3, the final norm
        Naming("open-mmlab Swin", marks, (*OPEN_MMLAB_SWIN, norms), SWIN_CROPS, OPEN_MMLAB_VALUES)
        for marks, norms in (
            ((_OPEN_MMLAB, r"^norm[0-2]\."), (r"^norm(\d)\.", r"norms.\1.")),
            ((_OPEN_MMLAB,), (r"^norm3\.", "norm.")),
        )
    ),
    Naming("timm Swin", (r"^layers\.1\.downsample\.",), TIMM_SWIN, TIMM_SWIN_CROPS),
)
NATIVE = Naming("native", (), ((r"^features\.model\.", ""),), {})  # TimmBackbone's prefix
CROPS = {naming.source: naming.crops for naming in NAMINGS}

# learned position tables: interpolation mode and channel axis of the 4-D table
POSITIONS = {
    "relative_position_bias_table": ("bicubic", 3),
    "positional_encoding": ("bicubic", 3),
    "ah_bias": ("bilinear", 1),
    "aw_bias": ("bilinear", 1),
    "ha_bias": ("bilinear", 3),
    "wa_bias": ("bilinear", 3),
}


class Converted(NamedTuple):
    """A checkpoint's tensors under a model's names.

    Attributes:
        tensors: Tensors not known to belong elsewhere.
        source: Source of the names; ``native`` for the model's own.
        origins: The checkpoint's name of each tensor.
        left_over: The checkpoint's names of other parts' tensors: heads, necks, output norms, copies.
        averaged: Whether the tensors come from a prefixed averaged copy in the checkpoint.
    """

    tensors: StateDict
    source: str
    origins: dict[str, str]
    left_over: tuple[str, ...]
    averaged: bool


def convert_state_dict(
    state_dict: StateDict, model: nn.Module, renames: Sequence[tuple[str, str]] = (), *, use_ema: bool = True
) -> Converted:
    """Rename a checkpoint's tensors to a model's names.

    The model's tensors may have a prefix such as ``module.`` or ``backbone.``: the one that matches the most names is
    used if it matches more than half of them, and tensors outside it are left over. Computed buffers are dropped; keys
    that no rule matches are kept.

    Args:
        state_dict: The checkpoint's tensors.
        model: Target model.
        renames: Additional regular expressions and replacements. Those that match a checkpoint name are applied before
            the scheme is detected, the others to the converted names.
        use_ema: Prefer an averaged copy, detected by its prefix.

    Raises:
        ValueError: Two tensors map to one name, or a regular expression is invalid.
    """
    own = model.state_dict().keys()
    early = [rename for rename in renames if any(_substitute(key, [rename]) != key for key in state_dict)]
    names = {key: _substitute(key, early) for key in state_dict}
    prefix, new, naming = _locate(names, own, [rename for rename in renames if rename not in early], use_ema)
    if prefix:  # open-mmlab's classifier is outside the backbone's prefix
        taken = set(new.values())
        new |= {key: name for key, name in names.items() if key not in new and name in own and name not in taken}
    new = {key: name for key, name in new.items() if name in own or not name.startswith(LEVEL_NORMS)}
    origins: dict[str, str] = {}
    for key, name in new.items():
        if name in origins:
            raise ValueError(f"two tensors of the checkpoint map to {name}: {origins[name]} and {key}")
        origins[name] = key
    return Converted(
        tensors={name: _changed(state_dict[key], name, naming) for name, key in origins.items()},
        source=naming.source,
        origins=origins,
        left_over=tuple(key for key in state_dict if key not in new and not key.endswith(DERIVED)),
        averaged=bool(AVERAGED.search(prefix)),
    )


def _locate(
    names: Mapping[str, str], own: Set[str], renames: Sequence[tuple[str, str]], use_ema: bool
) -> tuple[str, dict[str, str], Naming]:
    """Return the prefix of the model's tensors, the new name of each key, and the naming scheme."""
    parts: dict[str, dict[str, str]] = defaultdict(dict, {"": {}})
    for key, name in names.items():
        for end in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            parts[name[:end]][key] = name[end:]
    half = len(own) / 2
    found = {p: _recognise(part, own, renames) for p, part in parts.items() if not p or len(part) > half}
    counts = {p: len(own & set(new.values())) for p, (new, _) in found.items()}
    best = max(found, key=lambda p: (counts[p], bool(AVERAGED.search(p)) == use_ema, -len(p)))
    best = best if counts[best] > half else ""
    return best, *found[best]


def _recognise(
    old: Mapping[str, str], own: Set[str], renames: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], Naming]:
    """Return the new name of each key, and the naming scheme."""
    old = {key: name for key, name in old.items() if name in own or not name.endswith(DERIVED)}
    foreign = [name for name in old.values() if name not in own]
    naming = next(
        (n for n in NAMINGS if all(any(re.search(mark, name) for name in foreign) for mark in n.marks)), NATIVE
    )
    # CSWin numbers a block's branches even if there is only one, which is another mechanism
    paired = {name.partition(".attns.1.")[0] for name in foreign if ".attns.1." in name}
    new = {}
    for key, name in old.items():
        if naming is not NATIVE and name.partition(".attns.0.")[0] not in paired:
            name = name.replace(".attns.0.", ".attns.")
        new[key] = _substitute(name, (*naming.rules, *renames))
    return new, naming


def _substitute(name: str, rules: Iterable[tuple[str, str | Callable[[re.Match], str]]]) -> str:
    for pattern, replacement in rules:
        try:
            name = re.sub(pattern, replacement, name)
        except re.error as error:
            raise ValueError(f"invalid regular expression in rename {pattern!r} to {replacement!r}: {error}") from error
    return name


def _changed(tensor: torch.Tensor, name: str, naming: Naming) -> torch.Tensor:
    for pattern, change in naming.values:
        if re.search(pattern, name):
            tensor = change(tensor)
    return tensor
