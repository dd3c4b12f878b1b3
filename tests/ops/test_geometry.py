"""Cutting and joining blocks."""

import pytest
import torch

from elfatt.ops.geometry import fit_block, from_blocks, pad_to_multiple, to_blocks


def test_a_block_at_least_as_large_as_the_map_is_the_map():
    assert fit_block((14, 14), (7, 20)) == (7, 14)
    assert fit_block((0, 2), (9, 5)) == (9, 2)


@pytest.mark.parametrize("size", [(6, 8), (5, 9), (1, 1), (2, 7)], ids=str)
@pytest.mark.parametrize("block", [(2, 4), (3, 3), (1, 1)], ids=str)
def test_joining_undoes_cutting(size, block):
    x = torch.randn(2, *size, 3)
    assert torch.equal(from_blocks(to_blocks(x, block), size), x)


def test_padding_is_zero_on_the_right_and_at_the_bottom():
    x = torch.ones(1, 3, 3, 1)
    padded = pad_to_multiple(x, (2, 2))
    assert padded.shape == (1, 4, 4, 1)
    assert padded[0, :3, :3].all() and not padded[0, 3].any() and not padded[0, :, 3].any()
    assert pad_to_multiple(padded, (2, 2)) is padded


def test_blocks_come_in_row_major_order():
    x = torch.arange(16).view(1, 4, 4, 1)
    blocks = to_blocks(x, (2, 2)).flatten(1)
    assert blocks.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
