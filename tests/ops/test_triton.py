"""The Triton backend without a GPU: its kernels in the interpreter, and compiled for GPUs that are not there."""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
POINTERS = {FLOAT: "*fp32", HALF: "*fp16", BRAIN: "*bf16"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_fused_kernels.py runs on the device")
def test_the_kernels_in_the_interpreter():
    """A process of its own, for triton reads the switch when it is imported."""
    kernels = Path(__file__).with_name("test_fused_kernels.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(kernels)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=kernels.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def tf32(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def recorded_launches(monkeypatch, shape, split, heads, block, dtype, lepe):
    """What the operation would launch, forward and backward, in mixed precision, for tensors without data."""
    from elfatt.ops.triton import launch

    calls = {}
    monkeypatch.setattr(launch, "launch", lambda kernel, _, *args, **meta: calls.update({kernel: (args, meta)}))
    b, h, w, c = shape

    def tensor(*size, dtype=FLOAT):
        return torch.empty(size, dtype=dtype, device="meta")

    qkv = tensor(b, h, w, 3 * c, dtype=dtype)
    weight_global, bias_global, weight_local, bias_local = (
        tensor(*size) if lepe else None for width in (split, c - split) for size in ((width, 1, 3, 3), (width,))
    )
    kept = launch.new_buffers(qkv, heads, split, block)
    options = (heads, split, block)
    launch.forward(qkv, weight_global, bias_global, weight_local, bias_local, *kept, *options)
    launch.lepe(qkv[..., 2 * c :], tensor(c, 1, 3, 3), tensor(c), kept[0], kept[0])
    launch.backward(tensor(*shape, dtype=dtype), qkv, weight_global, weight_local, *kept[1:], *options)
    return calls


def compile_for(capability, kernel, arguments, meta):
    """Registers and bytes of stack of a thread, bytes of shared memory, of a launch on a GPU that need not be there."""
    options = {name: meta[name] for name in ("num_warps", "maxnreg") if name in meta}
    constants = {name: value for name, value in meta.items() if name not in options}
    signature, attributes = {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        if value is None:
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, f"{kernel.__name__} is compiled for values of {parameter.name}"
            signature[parameter.name] = "i32"
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        tool = Path(inspect.getfile(triton)).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, built.metadata.shared


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have
REGISTER_FILE = 2**16  # registers of a multiprocessor
CHIPS, WIDTHS, SIDES = list(SHARED), (24, 32, 48, 64), (7, 14, 24)
DTYPES = {"bf16": BRAIN, "fp32": FLOAT, "tf32": FLOAT, "fp16": HALF}
# bytes of a thread's stack: half precision spills little, float32 as three products more, off Hopper
STACK = {"bf16": 320, "fp16": 320, "tf32": 256, "fp32": 1536}
COMPILED = [
    (chip, name, WIDTHS[(i + j) % 4], SIDES[(i + j // 2) % 3])
    for i, chip in enumerate(CHIPS)
    for j, name in enumerate(DTYPES)
]
# the widest heads that `auto` takes
COMPILED += [(80, "bf16", 64, 14), (89, "fp16", 64, 7), (90, "bf16", 64, 7), (80, "fp32", 32, 7), (90, "fp32", 32, 7)]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("chip", "name", "width", "side"), COMPILED, ids=str)
def test_kernels_compile_without_a_gpu(monkeypatch, chip, name, width, side):
    """Compile 24 of the 288 combinations of chip, dtype, head width and block, and those that `auto` takes.

    The 24 hold every pair of chip and dtype, chip and width, dtype and width, dtype and block, and chip and block.
    """
    shape = 64, 56, 56, 2 * width
    with tf32(name == "tf32"):
        calls = recorded_launches(monkeypatch, shape, width, (1, 1), (side, side), DTYPES[name], True)
    assert len(calls) >= 7
    found = {kernel.__name__: compile_for(chip, kernel, *call) for kernel, call in calls.items()}
    print("".join(f"\n{k}: {r} registers, {stack} stack, {shared} shared" for k, (r, stack, shared) in found.items()))
    assert {k: v for k, v in found.items() if v[1] > STACK[name] or v[2] > SHARED[chip] * 1024} == {}
    threads = {kernel.__name__: 32 * meta["num_warps"] for kernel, (_, meta) in calls.items()}
    assert {k: v for k, v in found.items() if v[0] * threads[k] > REGISTER_FILE} == {}


@pytest.mark.parametrize(
    ("block", "rows"),
    [((7, 7), 4), ((14, 14), 4), ((24, 24), 4), ((5, 5), 2), ((9, 7), 1), ((1, 70), 1), ((13, 13), 2)],
)
def test_strips_take_no_more_tiles_than_their_tokens(block, rows):
    from elfatt.ops.triton import launch

    constants = launch._local(FLOAT, 96, 1, 0, block, False)
    assert (constants["ROWS"], constants["PLACES"]) == (rows, -(-block[0] // rows) * rows * block[1])


def test_a_kernel_that_fails_is_named():
    from elfatt.ops.triton import launch

    class Kernel:
        __name__ = "context_kernel"

        def __getitem__(self, grid):
            def run(*_, **__):
                raise ValueError("out of resource:\n shared memory")

            return run

    with pytest.raises(RuntimeError, match="^context_kernel: out of resource: shared memory$"):
        launch.launch(Kernel(), 1)


def test_four_launches_forward(monkeypatch):
    from elfatt.ops.triton import launch

    calls = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *_, **__: calls.append(kernel.__name__))
    qkv = torch.empty(1, 128, 512, 192, dtype=BRAIN, device="meta")
    kept = launch.new_buffers(qkv, (1, 1), 32, (14, 14))
    launch.forward(qkv, None, None, None, None, *kept, (1, 1), 32, (14, 14))
    assert calls == ["context_kernel", "combine_kernel", "global_out_kernel", "local_out_kernel"]


def test_float32_products_follow_pytorch(monkeypatch):
    precisions = set()
    for allowed in (False, True):
        with tf32(allowed):
            calls = recorded_launches(monkeypatch, (1, 8, 8, 64), 32, (1, 1), (4, 4), FLOAT, False)
        precisions.add((allowed, *{meta["PRECISION"] for _, meta in calls.values() if "PRECISION" in meta}))
    assert precisions == {(False, "tf32x3"), (True, "tf32")}


class NoDevice:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self):
        return 1000  # not to be confused with one that is there

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_an_epoch_of_detection_compiles_little(monkeypatch):
    """Multi-scale training of CSWin-T: 495 sizes of a batch's images, each of which other ranks wait for."""
    from elfatt.ops.triton import launch

    if not hasattr(triton, "knobs"):
        pytest.skip("Triton before 3.4 has its hooks elsewhere")
    compiled = set()

    def hook(*, key, fn, **_):
        compiled.add((fn.name, str(key)))
        return True  # compile nothing, launch nothing

    def tensor(*size, dtype=BRAIN):
        return torch.empty(size, dtype=dtype, device="meta")

    sizes = {(s, long) for s in range(480, 801, 32) for long in range(s, 1345, 32)}
    sizes |= {(w, h) for h, w in sizes}
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    triton.runtime.driver.set_active(NoDevice())
    try:
        for height, width in sizes:
            for level, block in enumerate((7, 7, 14)):
                c, heads = 64 << level, 1 << level
                h, w = height >> level + 2, width >> level + 2
                qkv, lepe = tensor(2, h, w, 3 * c), (tensor(c // 2, 1, 3, 3, dtype=FLOAT), tensor(c // 2, dtype=FLOAT))
                options = ((heads, heads), c // 2, (block, block))
                kept = launch.new_buffers(qkv, *options)
                launch.forward(qkv, *lepe, *lepe, *kept, *options)
                launch.backward(kept[0], qkv, lepe[0], lepe[0], *kept[1:], *options)
            v, weight = tensor(2, height >> 5, width >> 5, 1536)[..., 1024:], tensor(512, 1, 3, 3, dtype=FLOAT)
            out = tensor(*v.shape)
            launch.lepe(v, weight, tensor(512, dtype=FLOAT), out, out)
            launch.lepe(out, weight, None, None, out, transposed=True)
            launch.lepe_sums(v, out)
    finally:
        with suppress(RuntimeError):  # without a GPU there is no other
            triton.runtime.driver.reset_active()
    print(f"{len(sizes)} sizes, {len(compiled)} compilations")
    assert len(compiled) <= 60
