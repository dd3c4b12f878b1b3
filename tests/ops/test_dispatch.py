"""The backend switch: names, nesting, refusals, and that each backend runs what it says."""

import re

import pytest
import torch

from elfatt import ops


def test_the_default_is_auto():
    assert ops.active_backend() == "auto"


def test_contexts_nest_and_end_on_errors():
    with ops.use_backend("math"):
        with pytest.raises(RuntimeError, match="inside"), ops.use_backend("reference"):
            assert ops.active_backend() == "reference"
            raise RuntimeError("inside")
        assert ops.active_backend() == "math"
    assert ops.active_backend() == "auto"


def test_an_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="unknown backend 'fast': choose one of auto, reference, math, sdpa"):
        with ops.use_backend("fast"):
            pass


@pytest.mark.skipif(ops.has_flash_attn(), reason="flash-attn is installed")
def test_flash_attn_is_refused_when_it_is_missing():
    with pytest.raises(ValueError, match="not installed: pip install flash-attn, or use 'sdpa'"):
        with ops.use_backend("flash_attn"):
            pass


@pytest.mark.parametrize(
    ("q", "bias", "reason"),
    [
        (torch.empty(1, 4, 2, 8), None, "needs CUDA tensors, not cpu"),
        (torch.empty(1, 4, 2, 8), torch.empty(2, 4, 4), "cannot add a position bias"),
        (torch.empty(1, 4, 2, 8, device="meta"), None, "needs CUDA tensors, not meta"),
    ],
)
def test_flash_attn_explains_each_refusal(q, bias, reason):
    assert not ops.can_run_flash_attn(q, bias)
    with pytest.raises(ValueError, match=re.escape(str(tuple(q.shape))) + f".*{reason}.*use 'sdpa'"):
        ops.can_run_flash_attn(q, bias, raise_error=True)


def test_flash_attn_wants_half_precision_and_small_heads(monkeypatch):
    class Cuda(torch.Tensor):
        device = torch.device("cuda")

    single = torch.empty(1, 4, 2, 8).as_subclass(Cuda)
    wide = torch.empty(1, 4, 2, 512, dtype=torch.float16).as_subclass(Cuda)
    for q, reason in ((single, "float16 or bfloat16, not float32"), (wide, "at most 256 channels, not 512")):
        with pytest.raises(ValueError, match=reason):
            ops.can_run_flash_attn(q, raise_error=True)


@pytest.mark.parametrize(("backend", "fused"), [("auto", True), ("sdpa", True), ("math", False), ("reference", False)])
def test_only_sdpa_calls_the_fused_operator(monkeypatch, backend, fused):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 4, 2, 8)
    with ops.use_backend(backend):
        ops.softmax_attention(q, q, q)
    assert bool(calls) == fused
