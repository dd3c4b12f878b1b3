"""Model zoo; each model is a timm entry point."""

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

# size, mechanism for E, letters per stage: E efficient, V vanilla, L local, H alternating V and E
MODELS = {
    "swin_tiny_elfatt": ("swin_tiny", "elfatt", "EEHV"),
    "swin_tiny_effatt": ("swin_tiny", "effatt", "EEHV"),
    "swin_tiny_global": ("swin_tiny", "vanilla", "VVVV"),
    "swin_tiny_local": ("swin_tiny", "vanilla", "LLLL"),
    "swin_tiny_agent": ("swin_tiny", "agent", "EEEL"),
    "swin_tiny_flatten": ("swin_tiny", "flatten", "EELL"),
    "swin_base_elfatt": ("swin_base", "elfatt", "EEHV"),
    "swin_base_effatt": ("swin_base", "effatt", "EEHV"),
    "swin_base_global": ("swin_base", "vanilla", "VVVV"),
    "swin_base_local": ("swin_base", "vanilla", "LLLL"),
    "swin_base_agent": ("swin_base", "agent", ("E", "E", "EE" + 16 * "L", "L")),
    "swin_base_flatten": ("swin_base", "flatten", "EELL"),
    "cswin_tiny_elfatt": ("cswin_tiny", "elfatt", "EEHV"),
    "cswin_tiny_effatt": ("cswin_tiny", "effatt", "EEHV"),
    "cswin_tiny_global": ("cswin_tiny", "vanilla", "VVVV"),
    "cswin_tiny_local": ("cswin_tiny", "vanilla", "LLLV"),
    "cswin_tiny_agent": ("cswin_tiny", "agent", "EELV"),
    "cswin_tiny_flatten": ("cswin_tiny", "flatten", "EELV"),
    "cswin_base_elfatt": ("cswin_base", "elfatt", "EEHV"),
    "cswin_base_effatt": ("cswin_base", "effatt", "EEHV"),
    "cswin_base_global": ("cswin_base", "vanilla", "VVVV"),
    "cswin_base_local": ("cswin_base", "vanilla", "LLLV"),
    "cswin_base_agent": ("cswin_base", "agent", "EELV"),
    "cswin_base_flatten": ("cswin_base", "flatten", "EELV"),
    "swin_nano_elfatt": ("swin_nano", "elfatt", "EEHV"),
    "cswin_nano_elfatt": ("cswin_nano", "elfatt", "EEHV"),
}

# VMamba has only one mechanism; officially vmamba_tiny_s1l8
VMAMBA = {"vmamba_tiny": {"embed_dim": 96, "depths": (2, 2, 8, 2), "ssm_ratio": 1.0}}

# Swin's windows and CSWin's stripes by training resolution in pixels; other sizes use 224's
WINDOW_SIZES: dict[int, dict] = {
    224: {"swin": 7, "cswin": (1, 2, 7, 7)},
    384: {"swin": 12, "cswin": (1, 2, 12, 12)},
}
BLOCK_SIZES = {("cswin_tiny_elfatt", 224): (7, 7, 14)}  # default: 1/16 of the resolution


def model_options(name: str, img_size: int | tuple[int, int] = 224) -> dict:
    """Return a model's published keywords for a training resolution.

    Args:
        name: One of ``list_models()``.
        img_size: Side or (height, width) in pixels; sizes other than 224 and 384 are built as 224.
    """
    if name in VMAMBA:
        return dict(VMAMBA[name])
    size, attention, levels = MODELS[name]
    shell = size.split("_")[0]
    height, width = to_2tuple(img_size)
    resolution = height if height == width and height in WINDOW_SIZES else 224
    return {
        **SIZES[size],
        "attention": attention,
        "levels": levels,
        "stem": "conv" if shell == "cswin" or attention == "elfatt" else "patch",
        "block_size": BLOCK_SIZES.get((name, resolution), resolution // 16),
        "window_size": WINDOW_SIZES[resolution][shell],
        "agents": (3, 4, 7, 7),
    }


def check_model(name: str) -> None:
    """Check that timm knows a model.

    Raises:
        ValueError: Unknown model; the message suggests the closest name, if any.
    """
    base = name.split(".")[0]
    if not is_model(base):
        raise ValueError(f"unknown model {name!r}{did_you_mean(base, timm_models())}")


def list_models() -> list[str]:
    """Return the names of all models, sorted; each is a timm entry point."""
    return sorted([*MODELS, *VMAMBA])


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


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in list_models()})


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
    entry_point.__doc__ = f"{shell.__name__} from the paper's tables; keywords override ``model_options({name!r})``."
    register_model(entry_point)


for _name in list_models():
    _register(_name)
