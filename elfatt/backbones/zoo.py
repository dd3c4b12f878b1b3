"""The table of models: sizes × mechanisms → timm entry points such as ``cswin_tiny_elfatt``; and VMamba-T."""

from __future__ import annotations

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models import list_models as timm_models

from elfatt.backbones.cswin import CSWinTransformer
from elfatt.backbones.swin import SwinTransformer
from elfatt.backbones.vmamba import VMamba
from elfatt.suggest import did_you_mean

SHELLS = {"swin": SwinTransformer, "cswin": CSWinTransformer, "vmamba": VMamba}

SIZES = {
    "swin_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "cswin_tiny": {"embed_dim": 64, "depths": (2, 4, 18, 1), "num_heads": (2, 4, 8, 16)},
    "cswin_base": {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)},
    # not in the paper: for CPUs, tests and the quickstart
    "swin_nano": {"embed_dim": 48, "depths": (1, 1, 2, 1), "num_heads": (2, 4, 8, 16)},
    "cswin_nano": {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (2, 4, 8, 16)},
}

# VMamba has one mechanism only; its authors call this size vmamba_tiny_s1l8
VMAMBA = {"vmamba_tiny": {"embed_dim": 96, "depths": (2, 2, 8, 2), "ssm_ratio": 1.0}}

# the mechanism behind the letter E, and the letters of the stages on each shell (E efficient, V vanilla, L local,
# H vanilla and efficient in turn); CSWin's local models end in one vanilla stage
ATTENTIONS = {
    "elfatt": {"attention": "elfatt", "swin": "EEHV", "cswin": "EEHV"},
    "effatt": {"attention": "effatt", "swin": "EEHV", "cswin": "EEHV"},
    "global": {"attention": "vanilla", "swin": "VVVV", "cswin": "VVVV"},
    "local": {"attention": "vanilla", "swin": "LLLL", "cswin": "LLLV"},
    "agent": {"attention": "agent", "swin": "EEEL", "cswin": "EELV"},
    "flatten": {"attention": "flatten", "swin": "EELL", "cswin": "EELV"},
}

# what single models have otherwise, by training resolution
_AGENT_IN_TWO_BLOCKS = {"levels": ("E", "E", "EE" + 16 * "L", "L")}
EXCEPTIONS = {
    ("swin_base_agent", 224): _AGENT_IN_TWO_BLOCKS,
    ("swin_base_agent", 384): _AGENT_IN_TWO_BLOCKS,
    ("cswin_tiny_elfatt", 224): {"block_size": (7, 7, 14)},
}

# block sides, windows and stripes by training resolution in pixels; any other image takes those of 224
RESOLUTIONS = {
    224: {"block_size": 14, "swin": 7, "cswin": (1, 2, 7, 7)},
    384: {"block_size": 24, "swin": 12, "cswin": (1, 2, 12, 12)},
}


def model_options(name: str, img_size: int | tuple[int, int] = 224) -> dict:
    """The published keywords of a model for a training resolution.

    Args:
        name: A model of ``list_models()``.
        img_size: Side or (height, width) in pixels; the tables know 224 and 384, any other size is built as 224.
    """
    if name in VMAMBA:
        return dict(VMAMBA[name])
    shell, size, mechanism = name.split("_")
    height, width = to_2tuple(img_size)
    resolution = height if height == width and height in RESOLUTIONS else 224
    sides, attention = RESOLUTIONS[resolution], ATTENTIONS[mechanism]
    options = {
        **SIZES[f"{shell}_{size}"],
        "attention": attention["attention"],
        "levels": attention[shell],
        "stem": "conv" if shell == "cswin" or mechanism == "elfatt" else "patch",
        "block_size": sides["block_size"],
        "window_size": sides[shell],
        "agents": (3, 4, 7, 7),
    }
    return {**options, **EXCEPTIONS.get((name, resolution), {})}


def check_model(name: str) -> None:
    """Raise ``ValueError`` for a model that timm does not know.

    Raises:
        ValueError: With the nearest name, where one is near.
    """
    base = name.split(".")[0]
    if not is_model(base):
        raise ValueError(f"unknown model {name!r}{did_you_mean(base, timm_models())}")


def list_models() -> list[str]:
    """Names of all models, sorted; each is a timm entry point."""
    return sorted(_names())


def _names():
    sizes = [size for size in SIZES if not size.endswith("nano")]
    named = [f"{size}_{mechanism}" for size in sizes for mechanism in ATTENTIONS]
    return [*named, "cswin_nano_elfatt", "swin_nano_elfatt", *VMAMBA]


def _cfg(name: str) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1" if name in VMAMBA else "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _names()})


def _register(name: str) -> None:
    shell = SHELLS[name.split("_")[0]]

    def entry_point(pretrained: bool = False, **kwargs):
        options = {**model_options(name, kwargs.get("img_size", 224)), **kwargs}
        return build_model_with_cfg(
            shell,
            name,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **options,
        )

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"{shell.__name__} of the paper's tables; keywords override ``model_options({name!r})``."
    register_model(entry_point)


for _name in _names():
    _register(_name)
