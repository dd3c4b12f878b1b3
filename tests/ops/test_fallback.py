"""``auto`` never fails where PyTorch's operators work: each way a kernel or a machine can fail, injected."""

import copy
import re

import pytest
import timm
import torch
import torch.multiprocessing as multiprocessing
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from elfatt import ops
from elfatt.attention import create_attention
from elfatt.ops import fused, triton
from elfatt.ops.cpp import launch
from elfatt.ops.dispatch import AUTO, get_backend, resolve

KERNELS = ("forward", "backward", "lepe", "lepe_sums")
SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "block_size": (2, 2, 2)}
pytestmark = pytest.mark.skipif(
    get_backend("cpp").unsupported_reason(torch.empty(1, 1, 1, 1)) is not None, reason="no C++ compiler"
)


class OutOfResources(Exception):
    """As Triton says it."""

    def __str__(self):
        return "out of resource: shared memory, Required: 114688, Hardware limit: 101376"


@pytest.fixture(autouse=True)
def forget_failures(monkeypatch):
    for backend in AUTO.values():
        monkeypatch.setattr(backend, "failures", {})
    monkeypatch.setattr(fused, "_explained", set())


def break_kernels(setattr, names, error=OutOfResources, after=0):
    """The kernels fail, after some calls, when they have written what they write."""
    for name in names:
        real, calls = getattr(launch, name), []

        def fail(*args, real=real, calls=calls, **options):
            result = real(*args, **options)
            calls.append(args)
            if len(calls) > after:
                raise error()
            return result

        setattr(launch, name, fail)


def train(backend, steps=10, seed=0, wrap=lambda model: model, attention="elfatt"):
    torch.manual_seed(seed)
    model = timm.create_model("cswin_nano_elfatt", attention=attention, num_classes=5, drop_path_rate=0.0, **SMALL)
    model = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # Adam would blow up rounding errors
    generator = torch.Generator().manual_seed(seed)
    with ops.use_backend(backend):
        for _ in range(steps):
            images = torch.randn(4, 3, 32, 32, generator=generator)
            loss = torch.nn.functional.cross_entropy(model(images), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [x.detach().clone() for x in model.parameters()]


@pytest.mark.parametrize(
    ("names", "after"),
    [(KERNELS, 0), (("forward",), 0), (("backward",), 0), (("lepe",), 0), (("lepe_sums",), 0), (("backward",), 5)],
    ids=["all", "forward", "backward", "lepe", "lepe_sums", "backward later"],
)
def test_training_ends_with_the_weights_of_sdpa(monkeypatch, caplog, names, after):
    attention = "flatten" if names[0].startswith("lepe") else "elfatt"  # which runs LePE by itself
    expected = train("sdpa", attention=attention)
    break_kernels(monkeypatch.setattr, names, after=after)
    found = train("auto", attention=attention)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    said = [record.message for record in caplog.records if "kernels failed" in record.message]
    assert said and len(said) == len(set(said)) == len(AUTO["cpu"].failures)
    assert all(
        re.search("cpp kernels failed for .* on cpu: out of resource.*ELFATT_BACKEND=sdpa", text) for text in said
    )


def test_all_kernels_broken_is_sdpa_bit_for_bit(monkeypatch):
    expected = train("sdpa", steps=3)
    break_kernels(monkeypatch.setattr, KERNELS)
    assert all(torch.equal(one, other) for one, other in zip(train("auto", steps=3), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["elfatt", "effatt", "vanilla"])
def test_a_broken_backward_in_mixed_precision_and_under_checkpointing(monkeypatch, name, dtype):
    torch.manual_seed(0)
    module = create_attention(name, dim=32, num_heads=2)
    x = torch.randn(2, 5, 6, 32)

    def gradients(backend, run):
        own = copy.deepcopy(module)
        with ops.use_backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = run(own, x)
        out.float().square().sum().backward()
        return [p.grad for p in own.parameters()]

    expected = gradients("sdpa", lambda own, x: own(x))
    break_kernels(monkeypatch.setattr, ("backward", "lepe_sums"))
    for run in (lambda own, x: own(x), ops.checkpoint):
        for backend in AUTO.values():
            backend.failures.clear()
        for one, other in zip(gradients("auto", run), expected, strict=True):
            assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * other.norm()


def test_a_broken_backward_under_a_dispatch_mode(monkeypatch):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    module = create_attention("elfatt", dim=32, num_heads=2, block_size=4)
    x = torch.randn(1, 6, 5, 32, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), x)
    break_kernels(monkeypatch.setattr, ("backward",))
    with Mode():
        torch.testing.assert_close(torch.autograd.grad(module(x).square().sum(), x), expected)
    assert AUTO["cpu"].failures


def test_a_compiled_graph_goes_on(monkeypatch):
    module = create_attention("elfatt", dim=32, num_heads=2, block_size=4)
    x = torch.randn(1, 6, 5, 32)

    def gradients(run):
        return torch.autograd.grad(run(x).square().sum(), list(module.parameters()))

    with ops.use_backend("sdpa"):
        expected = gradients(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients(compiled)
    break_kernels(monkeypatch.setattr, KERNELS)
    torch.testing.assert_close(gradients(compiled), expected)


@pytest.mark.slow
def test_a_compiled_graph_of_permuted_maps_goes_on(monkeypatch):
    """What a failed kernel returns is laid out as the kernel's own result, for the graph counts on it."""
    options = {"num_heads": (1, 1), "global_channels": 16, "block_size": 4}
    weights = [torch.randn(32, 1, 3, 3), torch.randn(32)]
    leaves = [torch.randn(1, 96, 6, 5).requires_grad_(), torch.randn(1, 32, 6, 5).requires_grad_()]

    def run(packed, v):
        out = ops.elfatt_attention(packed.permute(0, 2, 3, 1), **options)
        return ops.add_lepe(out, v.permute(0, 2, 3, 1), weights)

    def gradients(run):
        return torch.autograd.grad(run(*leaves).square().sum(), leaves)

    with ops.use_backend("sdpa"):
        expected = gradients(run)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    gradients(compiled)
    break_kernels(monkeypatch.setattr, KERNELS)
    torch.testing.assert_close(gradients(compiled), expected)


def test_one_configuration_leaves_the_others_alone(monkeypatch):
    real = launch.forward

    def forward(qkv, *args):
        if qkv.shape[-1] == 96:
            raise OutOfResources
        return real(qkv, *args)

    monkeypatch.setattr(launch, "forward", forward)
    options = {"num_heads": (1, 1), "block_size": 2}
    for channels in (32, 64):
        ops.elfatt_attention(torch.randn(1, 4, 4, 3 * channels), global_channels=channels // 2, **options)
    (device, dtype, widths, block), *others = AUTO["cpu"].failures
    assert (device.type, dtype, widths, block, others) == ("cpu", torch.float32, (16, 16), (2, 2), [])
    x = torch.empty(1, 4, 4, 96)
    assert [resolve("auto", x, widths, (2, 2)).name for widths in ((16, 16), (32, 32))] == ["sdpa", "cpp"]
    assert resolve("auto", x, (16, 16), (4, 4)).name == "cpp"


def test_a_named_backend_raises(monkeypatch):
    break_kernels(monkeypatch.setattr, ("forward",))
    with pytest.raises(OutOfResources, match="shared memory") as error:
        ops.elfatt_attention(
            torch.randn(1, 4, 4, 96), num_heads=(1, 1), global_channels=16, block_size=2, backend="cpp"
        )
    assert "'sdpa'" in error.value.__notes__[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_is_no_broken_kernel(monkeypatch, error):
    break_kernels(monkeypatch.setattr, ("forward",), error=error)
    with pytest.raises(error):
        ops.elfatt_attention(torch.randn(1, 4, 4, 96), num_heads=(1, 1), global_channels=16, block_size=2)
    assert not AUTO["cpu"].failures


def test_what_pytorch_cannot_run_either_is_no_broken_kernel(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("not enough memory")

    break_kernels(monkeypatch.setattr, ("forward",))
    monkeypatch.setattr(fused, "_portable_attention", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        ops.elfatt_attention(torch.randn(1, 4, 4, 96), num_heads=(1, 1), global_channels=16, block_size=2)
    assert not AUTO["cpu"].failures


def _train_on(rank, folder):
    """Three runs of one process group: no rank's kernels broken, every rank's, one rank's."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weights = []
    for broken in ((), (0, 1), (1,)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AUTO["cpu"], "failures", {})
            if rank in broken:
                break_kernels(patch.setattr, KERNELS)
            weights.append(train("auto", steps=4, seed=rank, wrap=DistributedDataParallel))
    torch.save(weights, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_stay_together(tmp_path):
    multiprocessing.spawn(_train_on, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for run in zip(*ranks, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(*run, strict=True))
    whole, every_rank, one_rank = ranks[0]
    torch.testing.assert_close(every_rank, whole, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(one_rank, whole, rtol=1e-4, atol=2e-5)


# ---- what is asked of a machine before a kernel runs ----


class Cuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)
    is_cuda = True


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of a compute capability; the caches forget it afterwards."""
    caches = (triton._capability, triton._device_limit, triton._missing_toolchain, triton._missing_package)

    def forget():
        for cache in caches:
            cache.cache_clear()

    def make(capability, hip=None):
        forget()
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield make
    monkeypatch.undo()
    forget()


def choice(dtype, width):
    x = torch.empty(1, 4, 4, 6 * width, dtype=dtype).as_subclass(Cuda)
    return resolve("auto", x, (width, width), (7, 7)).name


@pytest.mark.skipif(get_backend("triton").unsupported_reason() is not None, reason="triton is not installed")
class TestTriton:
    @pytest.mark.parametrize(
        ("capability", "dtype", "width", "chosen"),
        [
            ((9, 0), torch.bfloat16, 64, "triton"),
            ((9, 0), torch.float32, 32, "triton"),
            ((9, 0), torch.float32, 48, "sdpa"),
            ((8, 0), torch.float16, 48, "triton"),
            ((8, 6), torch.float32, 32, "triton"),
            ((8, 9), torch.float32, 48, "sdpa"),
            ((10, 0), torch.bfloat16, 32, "sdpa"),
            ((12, 0), torch.float16, 32, "sdpa"),
            ((7, 5), torch.float16, 32, "sdpa"),
            ((9, 0), torch.float64, 32, "sdpa"),
            ((9, 0), torch.float16, 80, "sdpa"),
        ],
    )
    def test_auto_takes_the_kernels_where_they_are_verified(self, gpu, capability, dtype, width, chosen):
        gpu(capability)
        assert choice(dtype, width) == chosen

    def test_a_named_backend_runs_where_auto_does_not_yet(self, gpu, caplog):
        gpu((10, 0))
        assert choice(torch.bfloat16, 32) == "sdpa"
        assert "without the triton kernels: they are not verified on compute capability 10.0 in bfloat16" in caplog.text
        x = torch.empty(1, 4, 4, 192, dtype=torch.bfloat16).as_subclass(Cuda)
        assert get_backend("triton").unsupported_reason(x, (32, 32)) is None

    def test_rocm_waits(self, gpu, caplog):
        gpu((9, 4), hip="7.0")
        assert choice(torch.bfloat16, 32) == "sdpa"
        assert "they are not verified on ROCm" in caplog.text

    @pytest.mark.parametrize(
        ("inject", "reason"),
        [
            (lambda patch, path: [patch.setenv("PATH", str(path)), patch.delenv("CC", raising=False)], "a C compiler"),
            (lambda patch, path: patch.setenv("CC", "/nowhere/gcc"), "a C compiler"),
            (
                lambda patch, path: patch.setattr(triton.sysconfig, "get_paths", lambda scheme: {"include": str(path)}),
                "Python's headers",
            ),
            (
                lambda patch, path: patch.setattr("triton.__version__", "3.2.0"),
                "triton 3.3 or",
            ),
            (lambda patch, path: patch.setattr(triton.importlib.util, "find_spec", lambda _: None), "not installed"),
        ],
        ids=["no compiler", "wrong CC", "no headers", "old triton", "no triton"],
    )
    def test_what_a_machine_lacks_is_said_once(self, gpu, monkeypatch, tmp_path, caplog, inject, reason):
        gpu((9, 0))
        inject(monkeypatch, tmp_path)
        assert [choice(torch.float16, 32) for _ in range(2)] == ["sdpa"] * 2
        assert len(caplog.records) == 1 and reason in caplog.text
