"""The backend switch: names, nesting, refusals, and that each backend runs what it says."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from elfatt import ops
from elfatt.attention import create_attention
from elfatt.ops import dispatch, fused, triton
from elfatt.ops.cpp import build


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
    with pytest.raises(ValueError, match="unknown backend 'fast': choose one of auto, reference, plain, math, sdpa"):
        with ops.use_backend("fast"):
            pass


@pytest.mark.skipif(ops.get_backend("flash_attn").unsupported_reason() is None, reason="flash-attn is installed")
def test_flash_attn_is_refused_when_it_is_missing():
    with pytest.raises(ValueError, match="not installed: pip install flash-attn; use 'sdpa'"):
        with ops.use_backend("flash_attn"):
            pass


@pytest.mark.parametrize(
    ("q", "bias", "reason"),
    [
        (torch.empty(1, 4, 2, 8), None, "needs CUDA tensors, not cpu"),
        (torch.empty(1, 4, 2, 8), torch.empty(2, 4, 4), "does not support a bias"),
        (torch.empty(1, 4, 2, 8, device="meta"), None, "needs CUDA tensors, not meta"),
    ],
)
def test_flash_attn_explains_each_refusal(q, bias, reason):
    with pytest.raises(ValueError, match=re.escape(str(tuple(q.shape))) + f".*{reason}.*use 'sdpa'"):
        ops.get_backend("flash_attn").softmax_attention(q, q, q, bias)


def test_flash_attn_wants_half_precision_and_small_heads(monkeypatch):
    class Cuda(torch.Tensor):
        device = torch.device("cuda")

    single = torch.empty(1, 4, 2, 8).as_subclass(Cuda)
    wide = torch.empty(1, 4, 2, 512, dtype=torch.float16).as_subclass(Cuda)
    for q, reason in ((single, "float16 or bfloat16, not float32"), (wide, "up to 256 channels, not 512")):
        assert reason in ops.get_backend("flash_attn").unsupported_reason(q, (q.shape[-1],))


has_triton = ops.get_backend("triton").unsupported_reason() is None


def packed(width=32, dtype=torch.float32, device="cpu"):
    return torch.empty(1, 4, 4, 6 * width, dtype=dtype, device=device)


class Cuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)
    is_cuda = True


@pytest.mark.skipif(not has_triton, reason="triton is not installed")
@pytest.mark.parametrize(
    ("qkv", "reason"),
    [
        (packed(), "needs CUDA tensors, not cpu"),
        (packed(device="meta"), "needs CUDA tensors, not meta"),
        (packed(dtype=torch.float64).as_subclass(Cuda), "float16, bfloat16 or float32, not float64"),
        (packed(80).as_subclass(Cuda), "heads of up to 64 channels, not 80"),
    ],
)
def test_triton_explains_each_refusal(monkeypatch, qkv, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    width = qkv.shape[-1] // 6
    with pytest.raises(ValueError, match=re.escape(str(tuple(qkv.shape))) + f".*{reason}.*use 'sdpa'"):
        options = {"num_heads": (1, 1), "global_channels": width, "block_size": 2}
        ops.elfatt_attention(qkv, **options, backend="triton")


@pytest.mark.skipif(not has_triton, reason="triton is not installed")
@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_triton_wants_ampere(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton, "_capability", lambda index: capability)
    triton._device_limit.cache_clear()
    reason = ops.get_backend("triton").unsupported_reason(packed().as_subclass(Cuda), (32, 32))
    triton._device_limit.cache_clear()
    assert (reason is None) == runs


@pytest.mark.skipif(not has_triton, reason="triton is not installed")
def test_the_chosen_triton_backend_refuses_what_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.use_backend("triton"), pytest.raises(ValueError, match="'triton' does not support this tensor of shape"):
        ops.elfatt_attention(packed(), num_heads=(1, 1), global_channels=32, block_size=2)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (packed(dtype=torch.float64).as_subclass(Cuda), "triton kernels: .*(float64|not installed)"),
        (packed(dtype=torch.float64), "cpp kernels: it needs bfloat16 or float32, not float64"),
    ],
)
def test_auto_says_once_why_it_runs_without_its_kernels(monkeypatch, caplog, x, reason):
    monkeypatch.setattr(fused, "_explained", set())
    for _ in range(2):
        assert dispatch.resolve("auto", x, (32, 32), (2, 2)).name == "sdpa"
    assert len(caplog.records) == 1
    assert re.search(f"backend 'auto' runs without the {reason}", caplog.text)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (packed(device="meta"), "needs CPU tensors, not meta"),
        (packed(dtype=torch.float16), "needs bfloat16 or float32, not float16"),
    ],
)
def test_cpp_explains_each_refusal(x, reason):
    with (
        ops.use_backend("cpp"),
        pytest.raises(ValueError, match=f"'cpp' does not support this tensor of shape .*{reason}; use 'sdpa'"),
    ):
        ops.elfatt_attention(x, num_heads=(1, 1), global_channels=32, block_size=2)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_the_build()
    yield tmp_path
    forget_the_build()


def forget_the_build(caches=(build.library, build.unavailable_reason)):
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/c++", "cannot be run"), ("false", "the C.. compiler false failed"), (None, "no C.. compiler found")],
)
def test_without_a_compiler_auto_runs_pytorch_and_cpp_says_why(monkeypatch, fresh_build, caplog, compiler, reason):
    monkeypatch.setattr(fused, "_explained", set())
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(fresh_build))
    options = {"num_heads": (1, 1), "global_channels": 32, "block_size": 2}
    out = ops.elfatt_attention(torch.zeros(1, 4, 4, 192), **options)
    assert not out.any()
    assert re.search(f"without the cpp kernels: .*{reason}", caplog.text)
    monkeypatch.setattr(build, "library", pytest.fail)  # a compiler that fails is not tried again
    with ops.use_backend("cpp"), pytest.raises(ValueError, match=f"{reason}.*; use 'sdpa'"):
        ops.elfatt_attention(torch.zeros(1, 4, 4, 192), **options)


def test_the_kernels_are_compiled_once(fresh_build, caplog):
    if ops.get_backend("cpp").unsupported_reason(packed()):
        pytest.skip("no C++ compiler")
    forget_the_build()
    assert ops.get_backend("cpp").unsupported_reason(packed()) is None
    assert [path.suffix for path in (fresh_build / "elfatt").iterdir()] == [".so"]
    assert caplog.text.count("compiling the C++ kernels") == 1


def test_what_is_exported_or_traced_has_pytorch_s_operators_alone():
    module = create_attention("elfatt", dim=32, num_heads=2, block_size=2).eval()
    x = torch.randn(1, 4, 6, 32)
    program = torch.export.export(module, (x,))
    assert not [node.name for node in program.graph.nodes if str(node.target).startswith("elfatt")]
    traced = torch.jit.trace(module, x)
    assert "elfatt::" not in str(traced.inlined_graph)
    for found in (program.module(), traced):
        torch.testing.assert_close(found(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["elfatt", "effatt", "agent"])
def test_transformed_functions_run_pytorch_s_operators(name):
    """Custom operators have no forward-mode derivative, and PyTorch takes it for zero."""
    module = create_attention(name, dim=32, num_heads=2)
    x, tangent = torch.randn(2, 1, 4, 6, 32)

    def derivatives():
        along = torch.func.jvp(module, (x,), (tangent,))[1]
        return along, torch.func.grad(lambda x: module(x).square().sum())(x)

    with ops.use_backend("math"):
        expected = derivatives()
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused one has no forward mode and says so
        torch.testing.assert_close(derivatives(), expected, rtol=1e-4, atol=1e-5)


def test_fused_kernels_refuse_what_they_cannot_differentiate():
    if ops.get_backend("cpp").unsupported_reason(packed()):
        pytest.skip("no C++ compiler")
    module = create_attention("elfatt", dim=32, num_heads=2)
    x = torch.randn(1, 4, 6, 32)
    with ops.use_backend("cpp"), pytest.raises(ValueError, match="not torch.func or forward-mode AD; use 'sdpa'"):
        torch.func.jvp(module, (x,), (x,))


def test_triton_is_refused_when_it_is_missing(monkeypatch):
    monkeypatch.setattr(triton, "_missing_package", lambda: "it is not installed: pip install triton")
    with pytest.raises(ValueError, match="not installed: pip install triton; use 'sdpa'"):
        with ops.use_backend("triton"):
            pass
    assert ops.get_backend("triton").unsupported_reason(packed().as_subclass(Cuda), (32, 32))


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
