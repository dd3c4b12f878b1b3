"""Pairing tensors of unknown names by block and shape: only what is certain."""

import pytest

from elfatt.checkpoints.structure import pair_by_structure

NAMES = ["stem.conv.weight", "stages.0.blocks.0.attn.a.weight", "stages.0.blocks.10.attn.a.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("wanted", "given", "pairs", "choices"),
    [
        # one of each shape
        ({"norm.weight": "[4]"}, {"last.weight": "[4]"}, {"norm.weight": "last.weight"}, {}),
        ({"norm.weight": "[4]"}, {"last.weight": "[5]"}, {}, {}),
        ({"norm.weight": "[4]"}, {"last.bias": "[4]"}, {}, {}),
        # a module's tensors go together
        ({"norm.weight": "[4]", "norm.bias": "[4]"}, {"last.weight": "[4]"}, {}, {}),
        (
            {"norm.weight": "[4]", "norm.bias": "[4]", "stem.conv.weight": "[4, 3]", "stem.conv.bias": "[4]"},
            {"embed.0.weight": "[4, 3]", "embed.0.bias": "[4]", "embed.2.weight": "[4]", "embed.2.bias": "[4]"},
            {
                "norm.weight": "embed.2.weight",
                "norm.bias": "embed.2.bias",
                "stem.conv.weight": "embed.0.weight",
                "stem.conv.bias": "embed.0.bias",
            },
            {},
        ),
        # two of one shape
        (
            {"norm.weight": "[4]", "head.weight": "[4]"},
            {"last.weight": "[4]", "end.weight": "[4]"},
            {},
            {"norm": ["last", "end"], "head": ["last", "end"]},
        ),
        (
            {"norm.weight": "[4]", "head.weight": "[4]"},
            {"last.weight": "[4]"},
            {},
            {"norm": ["last"], "head": ["last"]},
        ),
        # a block is no other block, not even one whose number begins alike
        ({"stages.0.blocks.0.attn.a.weight": "[4]"}, {"stages.0.blocks.10.x.weight": "[4]"}, {}, {}),
        ({"norm.weight": "[4]"}, {"stages.0.blocks.0.x.weight": "[4]"}, {}, {}),
        (
            {"stages.0.blocks.10.attn.a.weight": "[4]", "stages.0.blocks.0.attn.a.weight": "[4]"},
            {"stages.0.blocks.0.x.1.weight": "[4]", "stages.0.blocks.10.y.weight": "[4]"},
            {
                "stages.0.blocks.10.attn.a.weight": "stages.0.blocks.10.y.weight",
                "stages.0.blocks.0.attn.a.weight": "stages.0.blocks.0.x.1.weight",
            },
            {},
        ),
        # a parameter of the block itself
        ({"stages.0.blocks.0.scale": "[4]"}, {"stages.0.blocks.0.gamma": "[4]"}, {}, {}),
    ],
)
def test_pairs(wanted, given, pairs, choices):
    assert pair_by_structure(wanted, given, NAMES) == (pairs, choices)
