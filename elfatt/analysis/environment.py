"""Hardware, versions and flags recorded with every measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import elfatt
from elfatt.ops import active_backend
from elfatt.ops.dispatch import resolve

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "flash-attn",
    "mamba-ssm",
    "onedl-mmengine",
    "onedl-mmsegmentation",
    "onedl-mmdetection",
    "diffusers",
    "tomesd",
    "onnxruntime",
    "openvino",
)


def describe_environment(device: str) -> dict[str, dict]:
    """Return the hardware, versions and flags of this process.

    Args:
        device: ``cpu`` or ``cuda``.

    Returns:
        ``hardware``, ``versions`` and ``flags``, each a flat JSON-serialisable dictionary.
    """
    hardware: dict[str, str | int] = {
        "device": _gpu_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes(device) / 2**30),
    }
    if device == "cpu":
        hardware["instructions"] = torch.backends.cpu.get_cpu_capability()
    versions: dict[str, str | int | None] = {
        "elfatt": _own_version(),
        "python": platform.python_version(),
        "system": platform.system(),
    }
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    flags: dict[str, str | bool] = {
        "backend": active_backend(),
        "auto_backend": resolve("auto", torch.empty(1, 1, 1, 1, device=device)).name,
    }
    flags |= {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    if device == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        flags |= {
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
        }
    return {"hardware": hardware, "versions": versions, "flags": flags}


def machine_name(device: str) -> str:
    """Return a short hardware name for file names, such as ``nvidia-h200`` or ``amd-epyc``."""
    name = _gpu_name() if device == "cuda" else _cpu_name()
    name = re.sub(r"\((r|tm)\)|processor|cpu", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def available_bytes(device: str) -> int:
    """Return the free memory in bytes."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    fields = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+)", fields.read_text()) if fields.exists() else None
    if not found:
        return _memory_bytes("cpu")
    free = 1024 * int(found[1])
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))  # container limits
    if limit.exists() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _own_version() -> str:
    """Return the version, with the commit in a checkout, so that results of different code are kept apart."""
    root = Path(elfatt.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return elfatt.__version__
    inside = (root / ".git").exists() and found.returncode == 0
    return f"{elfatt.__version__} ({found.stdout.strip()})" if inside else elfatt.__version__


def _gpu_name() -> str:
    return torch.cuda.get_device_name()


def _cpu_name() -> str:
    fields = Path("/proc/cpuinfo")
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", fields.read_text(), re.M) if fields.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
