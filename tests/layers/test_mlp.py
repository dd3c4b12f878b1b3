"""The MLP gives timm's results, in chunks or not."""

import pytest
import timm.layers
import torch

from elfatt.layers import Mlp, mlp


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (30, 8), (1, 1, 1, 8), (0, 3, 5, 8)], ids=str)
def test_chunks_give_the_results_of_the_whole(shape, monkeypatch):
    torch.manual_seed(0)
    own = Mlp(8, 16)
    x = torch.randn(shape)
    sizes = []
    own.fc1.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:-1].numel()))
    expected = timm.layers.Mlp.forward(own, x)
    monkeypatch.setattr(mlp, "TOKENS", 7)
    sizes.clear()
    with torch.inference_mode():
        torch.testing.assert_close(own(x), expected.detach())
    assert sum(sizes) == expected.shape[:-1].numel() and max(sizes) <= 7
    sizes.clear()
    torch.testing.assert_close(own(x), expected)
    assert len(sizes) == 1  # where gradients are kept, memory is too


def test_parameters_are_named_as_timm_names_them():
    assert Mlp(8, 16).state_dict().keys() == timm.layers.Mlp(8, 16).state_dict().keys()
