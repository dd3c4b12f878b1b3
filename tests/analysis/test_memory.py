"""Memory: the count against sums made by hand, and against what a process really takes."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

import elfatt  # noqa: F401
from elfatt.analysis import memory
from elfatt.analysis.memory import count_memory, fit_batch, measure_memory
from elfatt.analysis.timing import RunSpec

MIB = 2**20


class Chain(nn.Module):
    """Needs three tensors of its input's size at once, beside it: the square, its exponential, and their sum."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        square = x * x
        return square + square.exp()


def test_live_tensors_are_counted_until_they_are_freed():
    size = (1, 1, 1024, 1024)
    assert count_memory(Chain().to("meta"), size, "auto", torch.float32) == 3 * 4 * MIB
    chain = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(8))).to("meta")
    assert count_memory(chain, size, "auto", torch.float32) == 2 * 4 * MIB  # the one read and the one written
    views = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1024, 1024)), nn.PReLU(device="meta"))
    assert count_memory(views, size, "auto", torch.float32) == 4 * MIB
    assert count_memory(chain, size, "auto", torch.float16) == 2 * 2 * MIB
    # the inputs of all eight layers but the first, and the output, stay for the backward pass
    assert count_memory(chain, size, "auto", torch.float32, backward=True) == 8 * 4 * MIB


def test_what_fused_attention_keeps_for_the_backward_pass_is_counted():
    with torch.device("meta"):
        model = timm.create_model("cswin_tiny_global")
    forward, training = (count_memory(model, (1, 3, 224, 224), "auto", torch.float32, flag) for flag in (False, True))
    assert training > 10 * forward  # 25 blocks, each with its own activations


def build_chain(side):
    model, image = Chain(), torch.ones(1, 1, side, side)

    def run():
        with torch.inference_mode():
            return model(image)

    return run


def test_the_count_is_what_a_process_takes():
    counted = count_memory(Chain().to("meta"), (1, 1, 4096, 4096), "auto", torch.float32) / MIB
    assert measure_memory(partial(build_chain, 4096), "cpu") == pytest.approx(counted, rel=0.1)


def test_the_batch_is_halved_until_it_fits(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10 * MIB)
    batch, call = fit_batch("it", MIB, 64, (4, 4), RunSpec("cpu"), nn.Conv2d(3, 1, 1))
    assert batch == 8 and call().shape == (8, 1, 4, 4)
    assert "it: batch 64 needs about 0.1 GiB" in capsys.readouterr().err
    with pytest.raises(MemoryError, match="it with the auto backend needs about 0.0 GiB for one image of 4x4"):
        fit_batch("it", 11 * MIB, 64, (4, 4), RunSpec("cpu"))
