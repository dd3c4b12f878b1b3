"""Which backend is in force: threads, autograd's threads, checkpointing, modules, compiled graphs."""

import itertools
import threading
from collections import Counter

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from elfatt import ops
from elfatt.attention import create_attention, list_attentions
from elfatt.ops.dispatch import AUTO, BACKENDS, get_backend
from elfatt.ops.pytorch import MathBackend

COMPILED = get_backend("cpp").unsupported_reason(torch.empty(1, 1, 1, 1)) is None
needs_kernels = pytest.mark.skipif(not COMPILED, reason="no C++ compiler")


@pytest.mark.parametrize("order", sorted(set(itertools.permutations("aabb"))), ids="".join)
def test_threads_enter_and_leave_in_every_order(order):
    """Each letter is a step of that thread: the first enters its block, the second leaves it."""
    names, seen, turns = {"a": "math", "b": "reference"}, {"a": [], "b": []}, threading.Barrier(2, timeout=30)

    def work(letter):
        block = ops.use_backend(names[letter])
        steps = iter((block.__enter__, lambda: block.__exit__(None, None, None)))
        for turn in order:
            turns.wait()
            if turn == letter:
                next(steps)()
            turns.wait()
            seen[letter].append(ops.active_backend())

    threads = [threading.Thread(target=work, args=(letter,)) for letter in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for letter, name in names.items():
        inside = [order[: i + 1].count(letter) == 1 for i in range(len(order))]
        assert seen[letter] == [name if within else "auto" for within in inside]
    assert ops.active_backend() == "auto"


class _Nested(torch.autograd.Function):
    """A backward pass within the backward pass, so deep that autograd goes on in a thread of its own."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), ops.active_backend()))
        if ctx.depth:
            with torch.enable_grad():
                _Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


def test_the_threads_of_autograd_have_the_callers_backend():
    for name in ("math", "reference"):
        seen = []
        with ops.use_backend(name):
            _Nested.apply(torch.ones(1, requires_grad=True), 80, seen).backward()
        threads, names = zip(*seen, strict=True)
        assert len(set(threads)) > 1 and set(names) == {name}


def test_a_first_block_within_a_backward_pass_is_no_other_than_the_next():
    """Autograd restores what it hands to its threads: in a thread that had none, the block must be handed on again."""
    seen = []

    def work():
        x = torch.ones(1, requires_grad=True)
        ops.checkpoint(torch.sin, x).sum().backward()
        with ops.use_backend("math"):
            _Nested.apply(x, 80, seen).backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert {name for _, name in seen} == {"math"}


def test_a_block_within_an_autograd_thread_gives_back_what_it_found():
    seen = []

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with ops.use_backend("reference"):
                seen.append(ops.active_backend())
            seen.append(ops.active_backend())
            return grad

    with ops.use_backend("math"):
        Inner.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == ["reference", "math"]


def test_blocks_can_be_entered_again():
    block = ops.use_backend("math")
    with block, ops.use_backend("reference"), block:
        assert ops.active_backend() == "math"
    assert ops.active_backend() == "auto"


def test_the_default_is_every_threads(monkeypatch):
    monkeypatch.setattr("elfatt.ops.dispatch._default", "auto")
    ops.set_default_backend("math")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(ops.active_backend()))
    thread.start()
    thread.join()
    assert seen == ["math"]
    with ops.use_backend("reference"):
        assert ops.active_backend() == "reference"
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ops.set_default_backend("fast")


def spy_on_math(monkeypatch):
    calls = []
    real = MathBackend.softmax_attention
    monkeypatch.setattr(MathBackend, "softmax_attention", lambda self, *args: calls.append(1) or real(self, *args))
    return calls


def test_a_checkpointed_backward_runs_the_backend_of_its_forward(monkeypatch):
    calls = spy_on_math(monkeypatch)
    module = create_attention("vanilla", dim=16, num_heads=2)
    x = torch.randn(1, 4, 4, 16, requires_grad=True)
    with ops.use_backend("math"):
        out = ops.checkpoint(module, x)
    assert len(calls) == 1
    with ops.use_backend("reference"):
        out.sum().backward()
        assert ops.active_backend() == "reference"
    assert len(calls) == 2
    with ops.use_backend("math"):  # PyTorch's own, with both passes inside
        torch_checkpoint(module, x, use_reentrant=False).sum().backward()
    assert len(calls) == 4


def test_a_checkpointed_graph_is_walked_twice():
    module = create_attention("elfatt", dim=16, num_heads=2, block_size=2)
    x = torch.randn(1, 4, 4, 16, requires_grad=True)
    out = ops.checkpoint(module, x).square().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_checkpointed_model_runs_the_backend_of_its_forward(monkeypatch):
    calls = spy_on_math(monkeypatch)
    model = timm.create_model("cswin_nano_elfatt", num_classes=3).train()
    model.set_grad_checkpointing()
    with ops.use_backend("math"):
        out = model(torch.randn(1, 3, 32, 32))
    once = len(calls)
    out.sum().backward()
    assert once and len(calls) == 2 * once


@pytest.mark.parametrize("name", list_attentions())
def test_a_module_keeps_its_own_backend(name, monkeypatch):
    options = {"lepe": True} if name not in ("swin",) else {}
    module = create_attention(name, dim=16, num_heads=2, backend="reference", **options)
    assert "backend='reference'" in repr(module)
    x = torch.randn(1, 5, 6, 16, dtype=torch.float64)
    with ops.use_backend("math"):
        expected_not = module.double()(x)
    module.backend = None
    with ops.use_backend("reference"):
        assert torch.equal(module(x), expected_not)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        create_attention(name, dim=16, num_heads=2, backend="fast")


def test_a_model_takes_a_backend():
    model = timm.create_model("cswin_nano_elfatt", backend="math")
    assert {module.backend for module in model.modules() if hasattr(module, "attend")} == {"math"}


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("elfatt", {"block_size": 4, "channel_split": 0.25}, "num_heads=4, block_size=4, channel_split=0.25"),
        ("agent", {"agents": 3}, "num_heads=4, agents=3"),
        ("cswin", {"stripe": 2}, "num_heads=4, stripe=2"),
        ("swin", {"window_size": 5, "shifted": True}, "num_heads=4, window_size=5, shifted=True"),
        ("vanilla", {}, "num_heads=4"),
    ],
)
def test_printing_a_module_shows_its_options(name, options, shown):
    assert f"{shown}\n" in repr(create_attention(name, dim=32, num_heads=4, **options))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("flash_attn", "triton")])
def test_every_operation_takes_a_backend(backend):
    """By name and by ``use_backend`` alike, to the formula's result."""
    torch.manual_seed(0)
    qkv, kernels = torch.randn(1, 5, 6, 48), (torch.randn(16, 1, 3, 3), torch.randn(16))
    half = tuple(x[:8] for x in kernels)
    q, k, v = qkv.unflatten(-1, (3, 16)).unbind(3)
    tokens = [x.flatten(1, 2).unflatten(-1, (2, 8)) for x in (q, k, v)]
    biases = {"gather_bias": torch.randn(2, 4, 30), "broadcast_bias": torch.randn(2, 30, 4)}
    options = {"num_heads": (1, 1), "global_channels": 8, "block_size": 4, "lepe_global": half, "lepe_local": half}
    calls = {
        "elfatt": lambda **b: ops.elfatt_attention(qkv, **options, **b),
        "global": lambda **b: ops.global_branch(qkv.unflatten(-1, (3, 16)), num_heads=2, lepe=kernels, **b),
        "block": lambda **b: ops.block_attention(qkv.unflatten(-1, (3, 16)), num_heads=2, block=(4, 0), **b),
        "softmax": lambda **b: ops.softmax_attention(*tokens, **b),
        "efficient": lambda **b: ops.efficient_attention(*tokens, **b),
        "agent": lambda **b: ops.agent_attention(q, k, v, num_heads=2, agents=2, **biases, **b),
        "conv": lambda **b: ops.depthwise_conv(v, *kernels, **b),
        "lepe": lambda **b: ops.add_lepe(q, v, kernels, **b),
    }
    if backend == "cpp" and not COMPILED:
        pytest.skip("no C++ compiler")
    for name, call in calls.items():
        expected = call(backend="reference")
        with ops.use_backend(backend):
            ambient = call()
        with ops.use_backend("reference"):
            named = call(backend=backend)
        torch.testing.assert_close(named, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(named, ambient), name


# ---- compiled graphs ----


def compiled_nodes(module, x, *, backward=False, dynamic=None):
    """How often each fused operator stands in the graphs that ``torch.compile`` makes of one call."""
    nodes = Counter()

    def count(graph, _):
        nodes.update(str(node.target).split(".")[1] for node in graph.graph.nodes if "elfatt." in str(node.target))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        module, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True, dynamic=dynamic
    )
    with torch.set_grad_enabled(backward):
        out = compiled(x)
    if backward:
        out.square().sum().backward()
    return dict(nodes)


@needs_kernels
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("elfatt", "attention"),
        ("effatt", "attention"),
        ("vanilla", "attention"),
        ("agent", "lepe"),
        ("flatten", "lepe"),
    ],
)
def test_compiled_graphs_hold_the_fused_operators_under_auto(name, operator, dynamic):
    module = create_attention(name, dim=64, num_heads=2, lepe=True)
    x = torch.randn(1, 6, 5, 64)
    assert compiled_nodes(module, x, dynamic=dynamic) == {operator: 1}
    trained = compiled_nodes(module, x, backward=True, dynamic=dynamic)
    assert trained == {operator: 1, f"{operator}_backward": 1}


@needs_kernels
def test_a_compiled_operation_takes_other_channels():
    compiled = torch.compile(
        lambda qkv: ops.elfatt_attention(qkv, num_heads=(1, 1), global_channels=qkv.shape[-1] // 6, block_size=2),
        backend="aot_eager",
        dynamic=True,
    )
    torch._dynamo.reset()
    for channels in (16, 32, 48):
        qkv = torch.randn(1, 4, 6, 3 * channels)
        expected = ops.elfatt_attention(qkv, num_heads=(1, 1), global_channels=channels // 2, block_size=2)
        torch.testing.assert_close(compiled(qkv), expected)


def test_a_block_within_a_compiled_function():
    qkv = torch.randn(1, 4, 6, 48)
    options = {"num_heads": (1, 1), "global_channels": 8, "block_size": 2}

    def inside(x):
        with ops.use_backend("math"):
            return ops.elfatt_attention(x, **options)

    torch._dynamo.reset()
    compiled = torch.compile(inside, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv), ops.elfatt_attention(qkv, **options, backend="math"))
    assert ops.active_backend() == "auto"


@needs_kernels
def test_a_compiled_graph_refuses_forward_mode():
    module = create_attention("elfatt", dim=16, num_heads=2, block_size=2)
    x = torch.randn(1, 4, 4, 16)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        with torch.autograd.forward_ad.dual_level():
            compiled(x)
            with pytest.raises(RuntimeError, match="forward-mode.*'sdpa'"):
                compiled(torch.autograd.forward_ad.make_dual(x, x))


@needs_kernels
@pytest.mark.slow
def test_a_compiled_model_holds_the_fused_operators_under_auto():
    model = timm.create_model("cswin_nano_elfatt", num_classes=3)
    x = torch.randn(2, 3, 32, 48)
    forward = {"attention": 5}  # ELFATT in stages 1 to 3, vanilla in 3 and 4
    assert compiled_nodes(model.eval(), x) == forward
    backward = {"attention_backward": 5}
    assert compiled_nodes(model.train(), x, backward=True) == forward | backward
    assert compiled_nodes(model.train(), x, backward=True, dynamic=True) == forward | backward


@needs_kernels
def test_a_compiled_module_follows_the_ambient_backend():
    module = create_attention("elfatt", dim=32, num_heads=2, block_size=4)
    x = torch.randn(1, 6, 5, 32)
    nodes = Counter()

    def count(graph, _):
        nodes["graphs"] += 1
        nodes["fused"] += sum("elfatt." in str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    with torch.no_grad():
        compiled(x)
        assert nodes == {"graphs": 1, "fused": 1}
        with ops.use_backend("sdpa"):
            compiled(x)
        assert nodes == {"graphs": 2, "fused": 1}
        compiled(x)
        assert nodes == {"graphs": 2, "fused": 1}


def test_auto_is_one_choice_a_device():
    assert {device: backend.name for device, backend in AUTO.items()} == {"cuda": "triton", "cpu": "cpp"}
    assert all(backend.falls_back for backend in AUTO.values())
