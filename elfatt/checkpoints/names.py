"""Whose names a checkpoint uses, and what the package calls the same tensors.

Names follow microsoft/Swin-Transformer (swin_transformer.py), microsoft/CSWin-Transformer (cswin.py),
LeapLabTHU/FLatten-Transformer (flatten_swin.py, flatten_cswin.py), LeapLabTHU/Agent-Attention (agent_swin.py,
agent_cswin.py), MzeroMiko/VMamba (vmamba.py), facebookresearch/ConvNeXt (convnext.py, for timm's model) and timm
(swin_transformer.py). Another one is another row of ``NAMINGS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

StateDict = dict[str, torch.Tensor]

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
VMAMBA = (
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^layers\.(\d+)\.downsample\.1\.", _stage("stages.{}.downsample.conv.", 1)),
    (r"^layers\.(\d+)\.downsample\.3\.", _stage("stages.{}.downsample.norm.", 1)),
    (r"^layers\.(\d+)\.", r"stages.\1."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.op\.", r"\1.attn."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
)
CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(?=\d)", r"stages.\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(?=\d)", ".mlp.fc"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
)
_SWIN, _CSWIN = r"^layers\.0\.downsample\.", r"^stage1_conv_embed\."
_AGENT, _FLATTEN = r"\.an_bias$", r"\.positional_encoding$"

# the first row whose marks are all found counts
NAMINGS = (
    Naming("VMamba", (r"\.op\.A_logs$",), VMAMBA),
    Naming("Facebook ConvNeXt", (r"^downsample_layers\.0\.", r"\.dwconv\."), CONVNEXT),
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


def convert_state_dict(
    state_dict: StateDict, model: nn.Module, renames: Sequence[tuple[str, str]] = ()
) -> tuple[StateDict, str]:
    """Rename a checkpoint's tensors to a model's names, see ``new_names``.

    Returns:
        The same tensors under the new names, and whose names they had.
    """
    names, source = new_names(state_dict, model, renames)
    converted = {}
    for key, name in names.items():
        tensor = state_dict[key]
        # Agent's biases have a leading axis of one, with which they could not be channels-last
        converted[name] = tensor[0] if tensor.ndim == 5 and name.endswith(tuple(POSITIONS)) else tensor
    return converted, source


def new_names(
    keys: Iterable[str], model: nn.Module, renames: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, str], str]:
    """What a model calls a checkpoint's tensors.

    Wrappers' prefixes and buffers that the model computes itself are dropped; a key no rule knows stays as it is.

    Args:
        keys: The checkpoint's names.
        model: The model they are meant for.
        renames: Further regular expressions and their replacements, for the names that come out.

    Returns:
        The new name of each key that is kept, and whose names they were.

    Raises:
        ValueError: Two tensors end up under one name, or a regular expression is none.
    """
    own = model.state_dict().keys()
    old = {key: WRAPPERS.sub("", key) for key in keys}
    old = {key: name for key, name in old.items() if name in own or not name.endswith(DERIVED)}
    foreign = [name for name in old.values() if name not in own]
    naming = next(
        (n for n in NAMINGS if all(any(re.search(mark, name) for name in foreign) for mark in n.marks)),
        Naming("native", (), ()),
    )
    # CSWin counts the branches of a block even where there is only one, and that one is another mechanism
    paired = {name.partition(".attns.1.")[0] for name in foreign if ".attns.1." in name}
    new: dict[str, str] = {}
    taken = set()
    for key, name in old.items():
        if naming.rules and name.partition(".attns.0.")[0] not in paired:
            name = name.replace(".attns.0.", ".attns.")
        for pattern, replacement in (*naming.rules, *renames):
            try:
                name = re.sub(pattern, replacement, name)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} to {replacement!r} is no renaming by regular expression: {error}"
                ) from error
        if name in taken:
            raise ValueError(f"two tensors of the checkpoint are called {name}: {key} is one of them")
        taken.add(name)
        new[key] = name
    return new, naming.source
