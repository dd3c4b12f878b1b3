"""The Triton and the C++ kernels against the float64 formula, output and every gradient.

Triton's run on a CUDA device, or without one in its interpreter, which has to be chosen before triton is imported:
``test_triton.py`` starts a process for that. The sizes are small because the interpreter runs one program at a time.
"""

import importlib
import os
import sys

import pytest
import timm
import torch

from elfatt import ops
from elfatt.attention import create_attention
from elfatt.ops import fused
from elfatt.ops.depthwise import add_lepe

CUDA = torch.cuda.is_available()
PLACES = [("triton", "cpu")] if os.environ.get("TRITON_INTERPRET") == "1" else [("cpp", "cpu")]
if CUDA:
    PLACES.append(("triton", "cuda"))
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# beside twice PyTorch's own error: float32 sums in another order, half precision rounds the result to 2^-9 or 2^-12
SLACK = {FLOAT: 1e-6, HALF: 2.5e-4, BRAIN: 2e-3}
KERNELS = DEVICE = ""  # of the test that runs
NAMES = ("qkv", "weight_global", "bias_global", "weight_local", "bias_local")


@pytest.fixture(params=PLACES, ids="-".join, autouse=True)
def place(request, monkeypatch):
    for name, value in zip(("KERNELS", "DEVICE"), request.param, strict=True):
        monkeypatch.setattr(sys.modules[__name__], name, value)
    if KERNELS == "cpp" and ops.get_backend("cpp").unsupported_reason(torch.empty(1, 1, 1, 1)):
        pytest.skip("no C++ compiler")
    if KERNELS == "cpp" and request.node.callspec.params.get("dtype") == HALF:
        pytest.skip("the C++ kernels do not take float16")
    if request.cls and DEVICE == "cpu":
        pytest.skip("for the device")


def tensors(shape, split, dtype, lepe=True, spread=1.0):
    """A packed qkv and both branches' kernels; the kernels in float32, as mixed precision has them."""
    generator = torch.Generator().manual_seed(0)
    b, h, w, c = shape
    made = {"qkv": (torch.randn(b, h, w, 3 * c, generator=generator) * spread).to(dtype)}
    for name, width in (("global", split), ("local", c - split)):
        if lepe and width:
            made[f"weight_{name}"] = torch.randn(width, 1, 3, 3, generator=generator)
            made[f"bias_{name}"] = torch.randn(width, generator=generator)
    return {name: x.to(DEVICE) for name, x in made.items()}


def attend(given, split, heads, block):
    kernels = {
        f"lepe_{name}": (given[f"weight_{name}"], given.get(f"bias_{name}")) if f"weight_{name}" in given else None
        for name in ("global", "local")
    }
    return ops.elfatt_attention(given["qkv"], num_heads=heads, global_channels=split, block_size=block, **kernels)


def results(backend, given, dout, split, heads, block):
    """Output and gradients by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    with ops.use_backend(backend):
        out = attend(leaves, split, heads, block)
        out.backward(dout.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def errors(found, truth):
    return {name: ((found[name].double() - x).norm() / x.norm()).item() for name, x in truth.items()}


def check(given, split, heads, block):
    b, h, w, packed = given["qkv"].shape
    dtype = given["qkv"].dtype
    dout = torch.randn(b, h, w, packed // 3, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    truth = results("reference", {name: x.double() for name, x in given.items()}, dout, split, heads, block)
    found = results(KERNELS, given, dout, split, heads, block)
    plain = given if dtype == FLOAT else {name: x.to(dtype) for name, x in given.items()}
    theirs = errors(results("math", plain, dout, split, heads, block), truth)
    for name, error in errors(found, truth).items():
        assert found[name].dtype == (dtype if name in ("out", "dqkv") else FLOAT)
        assert error <= 2 * theirs[name] + SLACK[dtype], f"{name}: {error:.1e}, PyTorch's {theirs[name]:.1e}"


# [B, H, W, C], global channels, heads, block side, dtype
CASES = [
    ((1, 8, 8, 64), 32, (1, 1), 4, FLOAT),  # whole blocks
    ((2, 5, 9, 48), 24, (1, 1), 4, FLOAT),  # blocks over the border both ways, 24-wide heads, several images
    ((2, 7, 7, 64), 32, (1, 1), 7, BRAIN),  # the block is the map
    ((1, 9, 13, 96), 48, (1, 1), 7, HALF),  # 48-wide heads
    ((1, 9, 13, 96), 48, (2, 2), 7, BRAIN),
    ((1, 3, 11, 64), 32, (2, 2), 8, FLOAT),  # a map lower than the block, 16-wide heads
    ((1, 13, 10, 64), 32, (1, 1), 12, BRAIN),  # more than 64 tokens a block: two backward kernels
    ((1, 15, 14, 48), 24, (1, 1), 14, HALF),  # 128 queries a program
    ((1, 6, 5, 128), 64, (1, 1), 4, BRAIN),  # 64-wide heads
    ((1, 2, 3, 64), 32, (1, 1), 1, FLOAT),  # blocks of one token
    ((1, 1, 1, 64), 32, (1, 1), 7, HALF),  # maps of one token
    ((1, 9, 5, 64), 16, (1, 1), 4, FLOAT),  # other channel splits: 1/4, 3/4, none and all of them global
    ((1, 9, 5, 64), 48, (1, 1), 4, FLOAT),
    ((1, 9, 5, 64), 0, (2, 2), 4, FLOAT),
    ((1, 9, 5, 64), 64, (2, 2), 4, BRAIN),
    ((1, 5, 14, 32), 16, (1, 1), 12, BRAIN),  # 5 × 12 tokens a block, in strips of four 8 × 12
    ((1, 5, 5, 20), 12, (2, 1), 2, FLOAT),  # heads narrower than a matrix product of the hardware
]


@pytest.mark.parametrize(("shape", "split", "heads", "block", "dtype"), CASES, ids=str)
def test_output_and_gradients(shape, split, heads, block, dtype):
    check(tensors(shape, split, dtype), split, heads, block)


@pytest.mark.slow
def test_blocks_of_24():
    check(tensors((1, 24, 24, 16), 0, BRAIN), 0, (1, 1), 24)


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
def test_without_lepe(dtype):
    check(tensors((1, 5, 9, 48), 24, dtype, lepe=False), 24, (1, 1), 4)


@pytest.mark.parametrize("block", [4, 9])
def test_lepe_without_a_bias(block):
    given = tensors((1, 5, 11, 48), 24, FLOAT)
    check({name: x for name, x in given.items() if "bias" not in name}, 24, (1, 1), block)


def share_work(monkeypatch):
    """Cut a small map as only large ones are."""
    launch = importlib.import_module(f"elfatt.ops.{KERNELS}.launch")
    sizes = {"triton": {"SUMS": (2, 16), "APART": (2, 4)}, "cpp": {"SPLIT": 20, "TILE": (4, 8), "SMALL": 0}}
    for name, value in sizes[KERNELS].items():
        monkeypatch.setattr(launch, name, value)
    for name in ("_forward_plan", "_backward_plan", "_lepe_gradient") if KERNELS == "triton" else ():
        monkeypatch.setattr(launch, name, getattr(launch, name).__wrapped__)  # plans made before do not know


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
def test_work_in_groups(dtype, monkeypatch):
    """Large inputs have programs that take several tiles or blocks in turn, the last of them fewer."""
    share_work(monkeypatch)
    check(tensors((1, 15, 21, 32), 16, dtype), 16, (1, 1), 7)


def test_large_activations():
    """Softmax weights that are one or nothing, and a gradient scaled as far as float16 holds that of the scores."""
    given = tensors((1, 5, 6, 64), 32, HALF if KERNELS == "triton" else FLOAT, spread=100.0)
    dout = torch.randn(1, 5, 6, 64).to(DEVICE) * 8
    truth = results("reference", {name: x.double() for name, x in given.items()}, dout, 32, (1, 1), 4)
    found = results(KERNELS, given, dout, 32, (1, 1), 4)
    assert all(x.isfinite().all() for x in found.values())
    assert max(errors(found, truth).values()) < (2e-3 if KERNELS == "triton" else 2e-4)


def to_half(x):
    return x.to(BRAIN).to(FLOAT)


@pytest.mark.parametrize("spread", [1, 4, 16, 64])
def test_query_gradients_of_large_blocks(spread):
    """As exact as FlashAttention-2's in bfloat16, whose sums of P ⊙ dP are those of dO ⊙ output, for any softmax."""
    generator = torch.Generator().manual_seed(0)
    qkv, dout = (torch.randn(1, 10, 10, c, generator=generator) for c in (96, 32))
    qkv[..., :64] *= spread**0.5  # the scores' standard deviation
    given, dout = {"qkv": qkv.to(DEVICE, BRAIN)}, dout.to(DEVICE, BRAIN)
    truth = results("reference", {"qkv": given["qkv"].double()}, dout, 0, (1, 1), 10)["dqkv"][..., :32]
    found = results(KERNELS, given, dout, 0, (1, 1), 10)["dqkv"][..., :32]

    q, k, v = given["qkv"].float().view(100, 96).split(32, dim=1)
    do, scale = dout.float().view(100, 32), 32**-0.5
    p = (q @ k.T * scale).softmax(1)
    delta = (do * to_half(to_half(p) @ v)).sum(1, keepdim=True)
    theirs = to_half(to_half(p * (do @ v.T - delta)) @ k * scale).view(truth.shape)
    error, limit = errors({"dq": found}, {"dq": truth})["dq"], errors({"dq": theirs}, {"dq": truth})["dq"]
    cut_off = 4e-3 if DEVICE == "cpu" else 0  # the interpreter truncates to bfloat16 where a GPU rounds
    assert error <= 1.1 * limit + cut_off, f"{error:.1e}, FlashAttention-2's {limit:.1e}"


def test_keys_far_from_zero(monkeypatch):
    """Softmax knows no common offset: what the parts of a map sum up fits together, and so do both passes."""
    share_work(monkeypatch)
    given, dout = tensors((1, 15, 21, 32), 32, FLOAT, lepe=False), torch.randn(1, 15, 21, 32).to(DEVICE)
    given["qkv"][..., 32:64] += 1000
    truth = results("reference", {"qkv": given["qkv"].double()}, dout, 32, (1, 1), 7)
    found = results(KERNELS, given, dout, 32, (1, 1), 7)
    for result in (found, truth):
        result["dq"] = result.pop("dqkv")[..., :32]
    # Triton's interpreter rounds a product before it adds to it
    assert max(errors(found, truth).values()) < (1e-4 if KERNELS == "triton" else 2e-6)


def test_the_same_input_gives_the_same_bits(monkeypatch):
    share_work(monkeypatch)
    given, dout = tensors((1, 5, 17, 32), 16, BRAIN), torch.randn(1, 5, 17, 32).to(DEVICE)
    one = results(KERNELS, given, dout, 16, (1, 1), 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        two = results(KERNELS, given, dout, 16, (1, 1), 4)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_kernels_of_a_branch_without_channels_are_passed_over():
    given = tensors((1, 3, 4, 32), 0, FLOAT)
    none = torch.zeros(0, 1, 3, 3, device=DEVICE, requires_grad=True)
    options = {"num_heads": (1, 1), "global_channels": 0, "block_size": 2, "lepe_global": (none, None)}
    with ops.use_backend(KERNELS):
        ops.elfatt_attention(given["qkv"].requires_grad_(), **options).sum().backward()
    assert given["qkv"].grad.isfinite().all()


def test_an_empty_batch():
    leaves = {name: x.requires_grad_() for name, x in tensors((0, 5, 9, 64), 32, FLOAT).items()}
    with ops.use_backend(KERNELS):
        out = attend(leaves, 32, (1, 1), 4)
        out.sum().backward()
    assert out.shape == (0, 5, 9, 64)
    assert not leaves["weight_local"].grad.any()


def test_any_strides():
    given = tensors((1, 5, 6, 32), 16, FLOAT)
    wide = torch.zeros(1, 5, 6, 192, device=DEVICE)
    wide[..., ::2] = given["qkv"]
    with ops.use_backend(KERNELS):
        expected = attend(given, 16, (1, 1), 4)
        strided = attend({**given, "qkv": wide[..., ::2].requires_grad_()}, 16, (1, 1), 4)
    assert torch.equal(strided, expected)
    strided.sum().backward()  # an expanded gradient


@pytest.mark.parametrize("name", ["weight_global", "bias_local"])
def test_kernels_of_another_shape_are_named(name):
    given = tensors((1, 3, 4, 32), 16, FLOAT)
    with ops.use_backend(KERNELS), pytest.raises(ValueError, match="LePE of 16 channels needs weight "):
        attend({**given, name: given[name][:8]}, 16, (1, 1), 2)


def operator_arguments(split, lepe):
    given = {name: x.requires_grad_() for name, x in tensors((1, 3, 4, 32), split, FLOAT, lepe).items()}
    return [given.get(name) for name in NAMES], ([1, 1], split, [2, 4], KERNELS, False)


@pytest.mark.parametrize("lepe", [True, False])
def test_operator_registration(lepe):
    leaves, options = operator_arguments(16, lepe)
    torch.library.opcheck(fused._attention, (*leaves, *options))
    leaves = [x if x is None else x.detach() for x in leaves]
    kept = fused._attention(*leaves, *options)[1:]
    dout = torch.randn(1, 3, 4, 32, device=DEVICE)
    torch.library.opcheck(fused._attention_backward, (dout, *leaves, *kept, *options))


def lepe_leaves(dtype, bias=True):
    """V as the slice of a packed map that attention hands over, kernels, and attention's result."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 5, 9, 192, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight, offset = (torch.randn(*s, generator=generator).to(DEVICE).requires_grad_() for s in ((64, 1, 3, 3), (64,)))
    residual = torch.randn(2, 5, 9, 64, generator=generator).to(DEVICE, dtype).requires_grad_()
    return packed, weight, offset if bias else None, residual


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_lepe_beside_other_attention(dtype, bias, monkeypatch):
    share_work(monkeypatch)
    leaves = lepe_leaves(dtype, bias=bias)
    dout = torch.randn(2, 5, 9, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    outcomes = []
    for backend in (KERNELS, "reference"):
        packed, weight, offset, residual = (
            x if x is None or backend == KERNELS else x.detach().double().requires_grad_() for x in leaves
        )
        with ops.use_backend(backend):
            out = add_lepe(residual, packed[..., 64:128], (weight, offset))
        inputs = [x for x in (packed, weight, offset, residual) if x is not None]
        outcomes.append([out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))])
    for found, truth in zip(*outcomes, strict=True):
        # twice, for the interpreter truncates to bfloat16 where a GPU rounds
        assert (found - truth).norm() <= 2 * SLACK[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
@pytest.mark.parametrize("lepe", [True, False])
@pytest.mark.parametrize("block", [(0, 0), (0, 2), (4, 3)], ids=["map", "stripes", "padded blocks"])
def test_block_attention(block, lepe, dtype):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 6, 5, 3, 64, generator=generator).to(DEVICE, dtype)
    given = {"qkv": packed[..., 16:48]}  # half of a mechanism's channels, as CSWin's stripes take them
    if lepe:
        given |= {"weight": torch.randn(32, 1, 3, 3, generator=generator), "bias": torch.randn(32, generator=generator)}
        given = {name: x.to(DEVICE) for name, x in given.items()}
    dout = torch.randn(2, 6, 5, 32, generator=generator).to(DEVICE, dtype)

    def results(backend, given):
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        kernel = (leaves["weight"], leaves["bias"]) if lepe else None
        out = ops.block_attention(leaves["qkv"], num_heads=2, block=block, lepe=kernel, backend=backend)
        out.backward(dout.to(out.dtype))
        return {"out": out.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}

    truth = results("reference", {name: x.double() for name, x in given.items()})
    theirs = errors(results("math", {name: x.to(dtype) for name, x in given.items()}), truth)
    for name, error in errors(results(KERNELS, given), truth).items():
        assert error <= 2 * theirs[name] + SLACK[dtype], f"{name}: {error:.1e}, PyTorch's {theirs[name]:.1e}"


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [
        ((1, 4, 4, 2, 16), 2, r"qkv must be \[B, H, W, 3, C\], got \(1, 4, 4, 2, 16\)"),
        ((1, 0, 4, 3, 16), 2, "the map has no tokens"),
        ((1, 4, 4, 3, 16), 3, "16 channels cannot be split into 3 heads"),
    ],
    ids=["packing", "tokens", "heads"],
)
def test_block_attention_names_what_does_not_fit(shape, heads, message):
    with pytest.raises(ValueError, match=message):
        ops.block_attention(torch.randn(shape, device=DEVICE), num_heads=heads, block=(0, 0), backend=KERNELS)


def test_large_blocks_are_left_to_pytorch(monkeypatch):
    if KERNELS != "cpp":
        pytest.skip("Triton's block attention is PyTorch's")
    monkeypatch.setattr("elfatt.ops.cpp.LARGEST_BLOCK", 9)
    backend, calls = ops.get_backend("cpp"), []
    real = fused._attention
    monkeypatch.setattr(fused, "_attention", lambda *args: calls.append(args) or real(*args))
    for side, expected in ((2, 1), (4, 0)):
        calls.clear()
        backend.block_attention(torch.randn(1, 4, 4, 3, 16), num_heads=1, block=(side, side), lepe=None)
        assert len(calls) == expected


def test_lepe_of_an_empty_map():
    v, weight, bias = torch.empty(1, 0, 4, 64), torch.randn(64, 1, 3, 3), torch.randn(64)
    leaves = [x.to(DEVICE).requires_grad_() for x in (v, weight, bias)]
    with ops.use_backend(KERNELS):
        out = add_lepe(torch.empty_like(leaves[0]), leaves[0], leaves[1:])
        out.sum().backward()
    assert out.shape == (1, 0, 4, 64)
    assert not leaves[1].grad.any()


def test_lepe_registration():
    packed, weight, offset, residual = lepe_leaves(FLOAT)
    v, residual = (x.detach()[:1, :3, :4].requires_grad_() for x in (packed[..., 64:128], residual))
    torch.library.opcheck(fused._lepe, (v, weight, offset, residual, KERNELS, False))
    torch.library.opcheck(fused._lepe_backward, (*(x.detach() for x in (residual, v, weight, offset)), KERNELS, False))


@pytest.mark.parametrize("name", ["elfatt", "effatt", "vanilla"])
def test_compiles_without_a_break(name):
    torch.manual_seed(0)
    module = create_attention(name, dim=64, num_heads=2, **({"block_size": 4} if name == "elfatt" else {})).to(DEVICE)
    x = torch.randn(1, 6, 5, 64, device=DEVICE)
    gradients = []
    with ops.use_backend(KERNELS):
        for run in (module, torch.compile(module, fullgraph=True)):
            out = run(x)
            gradients.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["elfatt", "agent"])
def test_a_second_derivative_is_refused(name):
    module = create_attention(name, dim=32, num_heads=2).to(DEVICE)
    x = torch.randn(1, 4, 6, 32, device=DEVICE, requires_grad=True)
    with ops.use_backend(KERNELS):
        first = torch.autograd.grad(module(x).square().sum(), x)[0]
        loss = module(x).sum() + (x**2).sum()  # whose gradient at the operator's output needs none itself
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="not support double backward: use backend 'sdpa'"):
            gradient.pow(2).sum().backward()
        (again,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(again.mul_(2), 2 * first)


def test_a_residual_is_broadcast_as_pytorch_does():
    v, weight, bias, residual = torch.randn(2, 5, 6, 16), torch.randn(16, 1, 3, 3), torch.randn(16), torch.randn(6, 1)
    v, weight, bias, residual = (x.to(DEVICE) for x in (v, weight, bias, residual))
    with ops.use_backend(KERNELS):
        found = add_lepe(residual, v, (weight, bias))
        with pytest.raises(RuntimeError):
            add_lepe(residual.expand(3, 6, 1), v, (weight, bias))
        with pytest.raises(ValueError, match=r"expected a map \[B, H, W, C\], got \(5, 6, 16\)"):
            add_lepe(residual, v[0], (weight, bias))
    torch.testing.assert_close(found, add_lepe(residual, v, (weight, bias), backend="math"), rtol=1e-4, atol=1e-4)


def test_checkpointing():
    torch.manual_seed(0)
    module = create_attention("elfatt", dim=32, num_heads=2, block_size=4).to(DEVICE)
    x = torch.randn(1, 6, 5, 32, device=DEVICE, requires_grad=True)
    with ops.use_backend(KERNELS):
        direct = torch.autograd.grad(module(x).square().sum(), x)
        out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], direct[0])


@pytest.mark.parametrize("dtype", [HALF, BRAIN] if CUDA else [BRAIN], ids=str)
def test_automatic_mixed_precision(dtype):
    torch.manual_seed(0)
    module = create_attention("elfatt", dim=64, num_heads=2, block_size=4).to(DEVICE)
    x = torch.randn(1, 6, 5, 64, device=DEVICE)
    with ops.use_backend("reference"):
        truth = torch.autograd.grad(module.double()(x.double()).square().sum(), list(module.parameters()))
    with ops.use_backend(KERNELS), torch.autocast(DEVICE, dtype):
        out = module.float()(x)
        found = torch.autograd.grad(out.float().square().sum(), list(module.parameters()))
    assert out.dtype == dtype
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == FLOAT
        assert (one - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("elfatt", "_attention"),
        ("effatt", "_attention"),
        ("vanilla", {"cpp": "_attention", "triton": "_lepe"}),
        ("agent", "_lepe"),
        ("flatten", "_lepe"),
    ],
)
def test_mechanisms_run_the_kernels(name, operator, monkeypatch):
    calls = []
    operator = operator if isinstance(operator, str) else operator[KERNELS]
    real = getattr(fused, operator)
    monkeypatch.setattr(fused, operator, lambda *args: calls.append(args) or real(*args))
    with ops.use_backend(KERNELS), torch.no_grad():
        create_attention(name, dim=32, num_heads=2, lepe=True).to(DEVICE)(torch.randn(1, 3, 3, 32, device=DEVICE))
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [HALF, BRAIN] if CUDA else [BRAIN], ids=str)
def test_gradients_of_a_whole_model(dtype):
    """In mixed precision they are as near to float64 as PyTorch's own; without a device the model is a narrow one."""
    narrow = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "block_size": (4, 4, 2)}
    size = (224, 224) if CUDA else (20, 28)
    torch.manual_seed(0)
    model = timm.create_model("cswin_tiny_elfatt", drop_path_rate=0.0, **({} if CUDA else narrow)).to(DEVICE)
    images = torch.randn(1, 3, *size, device=DEVICE)

    def gradients(backend, mixed):
        with ops.use_backend(backend), torch.autocast(DEVICE, dtype, enabled=mixed):
            loss = (model.float()(images) if mixed else model.double()(images.double())).square().mean()
            found = torch.autograd.grad(loss * 64, list(model.parameters()))
        return torch.cat([x.double().flatten() for x in found])

    truth = gradients("reference", mixed=False)
    found, theirs = (gradients(backend, mixed=True) for backend in (KERNELS, "sdpa"))
    assert (found - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.slow
def test_training_takes_the_same_course():
    """200 steps on handwritten digits: every loss as with PyTorch's operators."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("hours in the interpreter")
    images = torch.tensor(digits.images, dtype=FLOAT, device=DEVICE)[:, None].repeat(1, 3, 2, 2) / 8 - 1
    labels = torch.tensor(digits.target, device=DEVICE)
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "block_size": (2, 2, 2)}

    def losses(backend):
        torch.manual_seed(0)
        model = timm.create_model("cswin_nano_elfatt", num_classes=10, drop_path_rate=0.0, **small).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(200):
            batch = torch.arange(32 * step, 32 * step + 32, device=DEVICE) % len(images)
            with ops.use_backend(backend):
                loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            yield loss.item()

    theirs = list(losses("sdpa"))
    assert theirs[-1] < theirs[0] / 3
    assert list(losses(KERNELS)) == pytest.approx(theirs, abs=1e-3)


if CUDA:

    class TestOnTheDevice:
        """What the interpreter cannot show: sizes of real models, graphs, the choice of `auto`."""

        @pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN], ids=str)
        @pytest.mark.parametrize(
            ("shape", "split", "heads", "block"),
            [
                ((8, 56, 56, 64), 32, (1, 1), 7),
                ((8, 28, 28, 128), 64, (2, 2), 14),
                ((8, 14, 14, 256), 128, (4, 4), 14),
                ((2, 96, 96, 96), 48, (1, 1), 24),
                ((1, 128, 512, 64), 32, (1, 1), 14),
                ((2, 50, 84, 96), 48, (2, 2), 14),
                ((2, 40, 40, 128), 64, (1, 1), 14),
            ],
            ids=str,
        )
        def test_sizes_of_the_models(self, shape, split, heads, block, dtype):
            check(tensors(shape, split, dtype), split, heads, block)

        def test_auto_chooses_the_kernels(self, monkeypatch):
            calls = []
            real = fused._attention
            monkeypatch.setattr(fused, "_attention", lambda *args: calls.append(args) or real(*args))
            attend(tensors((1, 9, 9, 64), 32, BRAIN), 32, (1, 1), 4)
            attend(tensors((1, 9, 9, 64), 32, torch.float64), 32, (1, 1), 4)
            assert len(calls) == 1

        def test_cuda_graph(self):
            module = create_attention("elfatt", dim=64, num_heads=2, block_size=7).to(DEVICE, HALF)
            x = torch.randn(4, 56, 56, 64, device=DEVICE, dtype=HALF, requires_grad=True)
            graphed = torch.cuda.make_graphed_callables(module, (x,))
            fresh = torch.randn_like(x).requires_grad_()
            found = torch.autograd.grad(graphed(fresh).float().sum(), fresh)
            assert torch.equal(found[0], torch.autograd.grad(module(fresh).float().sum(), fresh)[0])
