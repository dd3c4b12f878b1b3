"""The registry, and one-line errors for values that do not fit."""

import pytest
import torch
from torch import nn

import elfatt
from elfatt.attention import register_attention


def test_the_seven_mechanisms_are_listed():
    assert elfatt.list_attentions() == ["agent", "cswin", "effatt", "elfatt", "flatten", "swin", "vanilla"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("elfat", {}, "did you mean 'elfatt'"),
        ("xyz", {}, "choose one of agent"),
        ("elfatt", {"block_size": 0}, "block_size=0 must be at least 1"),
        ("elfatt", {"channel_split": 1.5}, "channel_split=1.5"),
        ("elfatt", {"num_heads": 5}, "dim=32 cannot be split into num_heads=5"),
        ("elfatt", {"dim": 36, "num_heads": 4, "channel_split": 0.25}, "leaves 9 channels for 2 heads"),
        ("cswin", {"num_heads": 1}, "num_heads=1 must be even"),
        ("cswin", {"stripe": 0}, "stripe=0"),
        ("swin", {"window_size": -1}, "window_size=-1"),
        ("agent", {"agents": 0}, "agents=0"),
        ("flatten", {"feat_size": (0, 3)}, "feat_height=0"),
        ("vanilla", {"num_heads": 0}, "num_heads=0"),
    ],
)
def test_bad_values_are_named_in_one_line(name, options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        elfatt.create_attention(name, **{"dim": 32, "num_heads": 4, **options})
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="'elfatt' has no option 'windows': it takes block_size"):
        elfatt.create_attention("elfatt", dim=32, num_heads=4, windows=3)


@pytest.mark.parametrize("name", elfatt.list_attentions())
@pytest.mark.parametrize("shape", [(1, 49, 32), (1, 7, 7, 16)], ids=str)
def test_another_shape_is_named(name, shape):
    with pytest.raises(ValueError, match=r"\[B, H, W, 32\], got"):
        elfatt.create_attention(name, dim=32, num_heads=4)(torch.zeros(shape))


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="already registered"):
        register_attention("elfatt")(nn.Identity)
