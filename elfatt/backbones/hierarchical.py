"""Hierarchical backbone with timm's interface, and the transformer base of Swin and CSWin."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, to_2tuple
from timm.models._features import feature_take_indices
from torch import nn

from elfatt.attention import attention_options, create_attention
from elfatt.layers import ConvMerge, Mlp, PatchMerge, Stem
from elfatt.ops import checkpoint


class Block(nn.Module):
    """Pre-norm transformer block on a map ``[B, H, W, C]``.

    Args:
        dim: Channels C.
        attention: Attention mechanism.
        mlp_ratio: MLP expansion ratio.
        drop_path: Stochastic depth rate.
    """

    def __init__(self, dim: int, attention: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Optional downsampling followed by blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, H, W, C]`` to ``[B, H', W', C']``."""
        x = self.downsample(x)
        if self.grad_checkpointing and self.training:
            for block in self.blocks:
                x = checkpoint(block, x)
            return x
        return self.blocks(x)


class HierarchicalBackbone(nn.Module):
    """Stem, stages, norm and classifier for any image size; subclasses pass the parts to ``assemble``."""

    no_weight_decay_suffixes: tuple[str, ...] = ()  # parameters without weight decay, besides biases and norms
    stages: nn.Sequential
    norm: nn.Module

    def assemble(
        self,
        stem: nn.Module,
        merge: Callable[[int, int], nn.Module],
        mixer: Callable[[int, int], nn.Module],
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        """Build the model.

        Args:
            stem: Module from an image to a stride-4 map with ``dims[0]`` channels.
            merge: Builds the downsampling between stages from input and output channels.
            mixer: Builds a block's token mixer from the stage index and the block index within it.
            dims: Channels per stage.
            depths: Blocks per stage.
            in_chans: Image channels.
            num_classes: Number of classes; 0 for no classifier.
            global_pool: Pooling before the classifier, as in timm.
            mlp_ratio: MLP expansion ratio.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last block, increasing linearly from 0.
        """
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.output_fmt = "NHWC"
        rates = iter(cast("list[float]", calculate_drop_path_rates(drop_path_rate, sum(depths))))
        self.stem = stem
        layers = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [Block(dim, mixer(i, j), mlp_ratio=mlp_ratio, drop_path=next(rates)) for j in range(depth)]
            layers.append(Stage(merge(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*layers)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm = nn.LayerNorm(dims[-1])
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
        )
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without weight decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.no_weight_decay_suffixes)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return layer groups for timm's layer-wise learning rates."""
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.\w+\.(\d+)", None)]
        )
        return {"stem": r"^stem", "blocks": blocks if coarse else [*blocks, (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in cast("Iterable[Stage]", self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; ``num_classes=0`` removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        if num_classes:
            self.head.apply(_init_weights)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the outputs of chosen stages.

        Args:
            x: Image ``[B, in_chans, H, W]``.
            indices: Last n stages, a list of stages, or None for all.
            norm: Apply the final norm to the last stage's output.
            stop_early: Skip the stages after the last one chosen.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: Return only the list.

        Returns:
            The list, or the final features ``[B, H', W', C]`` and the list.

        Raises:
            ValueError: Unknown ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NHWC'")
        wanted, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self._embed(x)
        for i, stage in enumerate(list(self.stages)[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                out = self.norm(x) if norm and i == len(self.stages) - 1 else x
                intermediates.append(out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == len(self.stages) - 1 else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove stages, norm and classifier that the chosen stages do not need; return the chosen indices."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        ends_early = last < len(self.stages) - 1
        del self.stages[last + 1 :]
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if ends_early:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map an image ``[B, in_chans, H, W]`` to normalised features ``[B, H', W', C]``."""
        return self.norm(self.stages(self._embed(x)))

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the stem; warn when tracing, which hard-codes blocks and padding for this image size."""
        if torch.jit.is_tracing():
            height, width = x.shape[2:]
            warnings.warn(
                f"traced for images of {height}×{width} pixels (height × width) only: outputs can be wrong at other "
                "sizes, without an error; trace again for each size, or use torch.export, which checks sizes",
                torch.jit.TracerWarning,
                stacklevel=1,
            )
        return self.stem(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map features ``[B, H', W', C]`` to logits ``[B, num_classes]`` or pooled features ``[B, C]``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map an image ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


MERGES = {"patch": PatchMerge, "conv": ConvMerge}
LETTERS = "E (efficient), V (vanilla) or L (local); H stands for V E V E …"


def expand_level(pattern: str, depth: int) -> str:
    """Expand a stage's pattern to one letter per block.

    Args:
        pattern: One letter for all blocks, ``H`` for alternating V and E, or one letter per block.
        depth: Number of blocks.

    Raises:
        ValueError: Unknown letter or wrong length.
    """
    blocks = ("VE" * depth)[:depth] if pattern == "H" else pattern * (depth if len(pattern) == 1 else 1)
    if len(blocks) != depth or set(blocks) - set("EVL"):
        raise ValueError(f"level {pattern!r} does not describe {depth} blocks: each is {LETTERS}")
    return blocks


def per_stage(name: str, value, stages: int) -> list:
    """Return one value per stage from a scalar or a sequence; short sequences repeat the last value.

    Raises:
        ValueError: The sequence is empty or longer than ``stages``.
    """
    values = list(value) if isinstance(value, Sequence) else [value]
    if not 1 <= len(values) <= stages:
        raise ValueError(f"{name}={value} must have 1 to {stages} values, one per stage")
    return values + values[-1:] * (stages - len(values))


class HierarchicalTransformer(HierarchicalBackbone):
    """Swin- or CSWin-shaped backbone with any mechanism in any block.

    Subclasses name their local mechanism. Each mechanism receives the stage's options that its signature declares.

    Args:
        img_size: Training image size in pixels, side or (height, width). Sets the size of agent and flatten attention's
            learned position tables, which are resized for other images.
        in_chans: Image channels.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the classifier, as in timm.
        embed_dim: Channels of the first stage; each stage doubles them.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        attention: Mechanism for the letter E.
        levels: One pattern per stage; see ``expand_level``.
        stem: Stem and downsampling: ``patch`` (Swin's) or ``conv`` (CSWin's).
        block_size: Side of ELFATT's blocks in tokens, one value or one per stage.
        channel_split: Fraction c1/c of ELFATT's channels in the global branch.
        lepe: Add LePE to the mechanisms that support it.
        agents: Side of the agent grid, one value or one per stage.
        agent_tables: Agent grid side of the stored biases (default: ``agents``).
        window_size: Swin's window side or CSWin's stripe width in tokens, one value or one per stage.
        mlp_ratio: MLP expansion ratio.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, increasing linearly from 0.
        backend: Attention backend, one of ``elfatt.ops.BACKENDS``; None for the active one.

    Raises:
        ValueError: Invalid value.
    """

    local: str  # mechanism for the letter L
    local_size: str  # its option set by ``window_size``
    overrides: Mapping[str, dict] = {}  # options by mechanism
    no_weight_decay_suffixes = ("relative_position_bias_table",)

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        attention: str,
        levels: Sequence[str],
        stem: str,
        block_size: int | Sequence[int] = 14,
        channel_split: float = 0.5,
        lepe: bool = True,
        agents: int | Sequence[int] = 7,
        agent_tables: int | Sequence[int] | None = None,
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        stages = len(depths)
        if len(levels) != stages:
            raise ValueError(f"levels={levels!r} must have {stages} patterns, one per stage: each block is {LETTERS}")
        if len(num_heads) != stages:
            raise ValueError(f"num_heads={num_heads} must have {stages} values, one per stage, like depths={depths}")
        mechanisms = {"E": attention, "V": "vanilla", "L": self.local}
        letters = [expand_level(level, depth) for level, depth in zip(levels, depths, strict=True)]
        dims = [embed_dim * 2**i for i in range(stages)]
        options = {
            "block_size": per_stage("block_size", block_size, stages),
            "agents": per_stage("agents", agents, stages),
            "tables": per_stage("agent_tables", agent_tables, stages),
            self.local_size: per_stage("window_size", window_size, stages),
            "feat_size": [tuple(max(1, -(-s // 2 ** (i + 2))) for s in to_2tuple(img_size)) for i in range(stages)],
            "channel_split": [channel_split] * stages,
            "lepe": [lepe] * stages,
            "backend": [backend] * stages,
        }

        def build_attention(stage: int, block: int) -> nn.Module:
            name = mechanisms[letters[stage][block]]
            offered = {option: values[stage] for option, values in options.items()}
            offered |= {"shifted": block % 2 == 1, **self.overrides.get(name, {})}
            chosen = {option: offered[option] for option in attention_options(name) if option in offered}
            return create_attention(name, dim=dims[stage], num_heads=num_heads[stage], **chosen)

        self.assemble(
            Stem(stem, in_chans, embed_dim),
            MERGES[stem],
            build_attention,
            dims=dims,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )


def _init_weights(module: nn.Module) -> None:
    """Initialise linear weights as in Swin and CSWin; leave convolutions and norms at PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
