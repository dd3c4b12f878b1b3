"""The Triton backend without a GPU: its kernels in the interpreter, and compiled for GPUs that are not there."""

import inspect
import os
import re
import subprocess
import sys
import tempfile
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
    """Bytes of registers that a thread spills and of shared memory, for one launch on a GPU that need not be there."""
    options = {"num_warps": meta["num_warps"]}
    constants = {name: value for name, value in meta.items() if name != "num_warps"}
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):  # as Triton specialises a launch
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(built.asm["ptx"])
        ptx.flush()
        architecture = re.search(r"\.target (\w+)", built.asm["ptx"])[1]
        assembler = Path(inspect.getfile(triton)).parent / "backends/nvidia/bin/ptxas"
        command = [assembler, "-v", f"--gpu-name={architecture}", ptx.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(size) for size in re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())
    return spills, built.metadata.shared


# what real models launch, with LePE or without, and bytes a thread may spill on an A100 and on an H100
COMPILED = [
    ((512, 56, 56, 64), 32, (1, 1), (7, 7), BRAIN, True, 0, 0),  # CSWin-T's first stage, several tiles a program
    ((512, 56, 56, 64), 32, (1, 1), (7, 7), FLOAT, False, 1536, 0),
    ((64, 14, 14, 256), 128, (4, 4), (14, 14), BRAIN, True, 0, 0),  # its third
    ((1, 128, 512, 96), 48, (1, 1), (14, 14), HALF, True, 64, 0),  # Swin-T's first on a street scene
    ((64, 28, 28, 128), 64, (2, 2), (7, 7), FLOAT, True, 1024, 0),
]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("shape", "split", "heads", "block", "dtype", "lepe", "ampere", "hopper"), COMPILED, ids=str)
def test_kernels_compile_without_a_gpu(monkeypatch, shape, split, heads, block, dtype, lepe, ampere, hopper):
    calls = recorded_launches(monkeypatch, shape, split, heads, block, dtype, lepe)
    assert len(calls) >= 5
    for capability, limit in ((80, ampere), (90, hopper)):
        for kernel, (arguments, meta) in calls.items():
            spills, shared = compile_for(capability, kernel, arguments, meta)
            print(f"sm_{capability} {kernel.__name__}: {spills} bytes spilled, {shared} bytes of shared memory")
            assert spills <= limit, f"{kernel.__name__} spills {spills} bytes on sm_{capability}"
            assert shared <= (99 if dtype == FLOAT else 64) * 1024  # what GPUs of any kind give one program; half of it


@pytest.mark.parametrize(
    ("block", "rows"),
    [((7, 7), 4), ((14, 14), 4), ((24, 24), 4), ((5, 5), 2), ((9, 7), 1), ((1, 70), 1), ((13, 13), 2)],
)
def test_strips_take_no_more_tiles_than_their_tokens(block, rows):
    from elfatt.ops.triton import launch

    constants = launch._local(torch.empty(1, 24, 70, 96, device="meta"), 1, 0, block)[-1]
    assert (constants["ROWS"], constants["PLACES"]) == (rows, -(-block[0] // rows) * rows * block[1])


def test_four_launches_forward(monkeypatch):
    from elfatt.ops.triton import launch

    calls = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *_, **__: calls.append(kernel.__name__))
    qkv = torch.empty(1, 128, 512, 192, dtype=BRAIN, device="meta")
    kept = launch.new_buffers(qkv, (1, 1), 32, (14, 14))
    launch.forward(qkv, None, None, None, None, *kept, (1, 1), 32, (14, 14))
    assert calls == ["context_kernel", "combine_kernel", "global_out_kernel", "local_out_kernel"]


def test_float32_products_follow_pytorch():
    from elfatt.ops.triton import launch

    assert launch._precision(torch.empty(1)) == "tf32x3"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert launch._precision(torch.empty(1)) == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
