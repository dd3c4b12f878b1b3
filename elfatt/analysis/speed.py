"""Speed as ratios within one run: ``python -m elfatt.analysis.speed {op,model,import} --help``.

The variants of a comparison take turns, so that whatever else the machine does hits all of them; a figure is the median
of the turns, and a variant whose output is not the formula's is refused.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
import torch.nn.functional as F

import elfatt
from elfatt.ops import use_backend

# batch, height, width, channels, heads of each branch, block side: CSWin-T's levels at 224² and at 512×2048
OP_SHAPES = {
    "224 level 1": (8, 56, 56, 64, 1, 7),
    "224 level 2": (8, 28, 28, 128, 2, 7),
    "224 level 3": (8, 14, 14, 256, 4, 14),
    "dense level 1": (1, 128, 512, 64, 1, 14),
    "dense level 2": (1, 64, 256, 128, 2, 14),
    "dense level 3": (1, 32, 128, 256, 4, 14),
}


def plain_elfatt(qkv, *, num_heads, global_channels, block_size, lepe_global, lepe_local) -> torch.Tensor:
    """The baseline: ELFATT as one writes it down first, with reshapes, transposes and NCHW convolutions."""
    b, h, w, c = *qkv.shape[:3], qkv.shape[3] // 3
    c1, c2, s = global_channels, c - global_channels, block_size
    q, k, v = qkv.reshape(b, h * w, 3, c).permute(2, 0, 1, 3)

    def heads(x, n):
        return x.reshape(*x.shape[:2], n, -1).transpose(1, 2)

    def lepe(x, size, kernel):
        image = x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], *size)
        return F.conv2d(image, *kernel, padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)

    query, key, value = (heads(x[..., :c1], num_heads[0]) for x in (q, k, v))
    out_global = query.softmax(-1) @ (key.softmax(-2).transpose(-2, -1) @ value)
    out_global = out_global.transpose(1, 2).reshape(b, h * w, c1) + lepe(v[..., :c1], (h, w), lepe_global)

    rows, columns = -(-h // s), -(-w // s)

    def blocks(x):
        x = F.pad(x[..., c1:].reshape(b, h, w, c2), (0, 0, 0, columns * s - w, 0, rows * s - h))
        return x.reshape(b, rows, s, columns, s, c2).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c2)

    q, k, v = (blocks(x) for x in (q, k, v))
    out_local = F.scaled_dot_product_attention(*(heads(x, num_heads[1]) for x in (q, k, v)))
    out_local = out_local.transpose(1, 2).reshape(-1, s * s, c2) + lepe(v, (s, s), lepe_local)
    out_local = out_local.reshape(b, rows, columns, s, s, c2).permute(0, 1, 3, 2, 4, 5)
    out_local = out_local.reshape(b, rows * s, columns * s, c2)[:, :h, :w]
    return torch.cat([out_global.reshape(b, h, w, c1), out_local], dim=-1)


def time_in_turns(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; all run once a turn, and two turns warm up."""
    times = {name: [] for name in variants}
    for turn in range(repeats + 2):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def check_equal(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse to time what is wrong.

    Raises:
        SystemExit: The relative error is not that of the dtype.
    """
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= 10 * torch.finfo(found.dtype).eps:
        sys.exit(f"speed.py: {name} is off by {error:.1e} in {found.dtype}: no speed is reported")


def compare_op(args: argparse.Namespace) -> None:
    """Print the time of the plain operation over that of each backend, for every shape."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    print(f"| shape | {' | '.join(args.backends)} |\n|---|{'---|' * len(args.backends)}")
    for shape, (b, h, w, c, heads, side) in OP_SHAPES.items():
        generator = torch.Generator().manual_seed(0)

        def draw(*size, generator=generator):
            return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_(args.backward)

        qkv = draw(b, h, w, 3 * c)
        options = {"num_heads": (heads, heads), "global_channels": c // 2, "block_size": side}
        options |= {name: (draw(c // 2, 1, 3, 3), draw(c // 2)) for name in ("lepe_global", "lepe_local")}

        def run(op, backend, qkv=qkv, options=options):
            with use_backend(backend), torch.set_grad_enabled(args.backward):
                out = op(qkv, **options)
                if args.backward:
                    out.backward(torch.ones_like(out))
                return out

        expected = run(plain_elfatt, "auto")
        variants = {"plain": lambda run=run: run(plain_elfatt, "auto")}
        for backend in args.backends:
            check_equal(backend, run(elfatt.ops.elfatt_attention, backend), expected)
            variants[backend] = lambda backend=backend, run=run: run(elfatt.ops.elfatt_attention, backend)
        seconds = time_in_turns(variants, args.repeats)
        cells = (f"{seconds['plain'] / seconds[backend]:.2f}×" for backend in args.backends)
        print(f"| {shape} | {' | '.join(cells)} |", flush=True)


def compare_models(args: argparse.Namespace) -> None:
    """Print each model's speed and memory over those of the first one."""
    variants = {}
    for name in args.models:
        model = timm.create_model(name).eval().to(args.device)
        image = torch.randn(args.batch_size, 3, *args.img_size, device=args.device)

        def run(model=model, image=image):
            with torch.inference_mode(), use_backend(args.backend):
                model.forward_features(image)

        variants[name] = run
    seconds = time_in_turns(variants, args.repeats)
    memory = {name: peak_memory_mib(name, args) for name in args.models}
    first = args.models[0]
    print("| model | images/s | speed-up | peak memory MiB | share |\n|---|---|---|---|---|")
    for name in args.models:
        print(
            f"| {name} | {args.batch_size / seconds[name]:.2f} | {seconds[first] / seconds[name]:.2f}× "
            f"| {memory[name]:.0f} | {memory[name] / memory[first]:.2f} |"
        )


def peak_memory_mib(name: str, args: argparse.Namespace) -> float:
    """What one forward pass takes beyond the weights, in MiB: the median of three fresh processes."""
    options = (name, args.batch_size, args.img_size, args.device, args.backend, torch.get_num_threads())
    found = []
    for _ in range(3):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(_forward_memory_mib, options))
    return median(found)


def _forward_memory_mib(name, batch, img_size, device, backend, threads):
    torch.set_num_threads(threads)
    model = timm.create_model(name).eval().to(device)
    image = torch.randn(batch, 3, *img_size, device=device)
    before = torch.cuda.memory_allocated() if device == "cuda" else _resident_bytes("VmRSS")
    with torch.inference_mode(), use_backend(backend):
        model.forward_features(image)
    after = torch.cuda.max_memory_allocated() if device == "cuda" else _resident_bytes("VmHWM")
    return (after - before) / 2**20


def _resident_bytes(field: str) -> int:
    # not getrusage: its peak starts at that of the parent process
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: memory on a CPU can be measured on Linux only")


def time_import(args: argparse.Namespace) -> None:
    """Print what ``import elfatt`` takes beyond torch and timm, in seconds."""
    code = "import torch, timm, time; t = time.perf_counter(); import elfatt; print(time.perf_counter() - t)"
    runs = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(args.repeats)]
    print(f"import elfatt beyond torch and timm: {median(runs):.3f} s, median of {args.repeats}")


def main() -> None:
    """Parse the command line and run one comparison."""
    parser = argparse.ArgumentParser(prog="python -m elfatt.analysis.speed", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], repeats: int) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--repeats", type=int, default=repeats, help="turns that count")
        return sub

    devices = {"default": "cuda" if torch.cuda.is_available() else "cpu", "choices": ["cpu", "cuda"]}
    op = command("op", compare_op, 20)
    op.add_argument("--backends", nargs="+", default=["auto", "math"], choices=elfatt.ops.BACKENDS)
    op.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    op.add_argument("--device", **devices)
    op.add_argument("--backward", action="store_true", help="time the backward pass as well")
    model = command("model", compare_models, 5)
    model.add_argument("--models", nargs="+", default=["cswin_tiny_global", "cswin_tiny_elfatt"])
    model.add_argument("--img-size", type=int, nargs=2, default=[224, 224], metavar=("HEIGHT", "WIDTH"))
    model.add_argument("--batch-size", type=int, default=4)
    model.add_argument("--backend", default="auto", choices=elfatt.ops.BACKENDS)
    model.add_argument("--device", **devices)
    command("import", time_import, 5)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    try:
        args.run(args)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"speed.py: {error}")


if __name__ == "__main__":
    main()
