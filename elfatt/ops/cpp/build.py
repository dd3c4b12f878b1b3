"""Compile the C++ kernels for this CPU on first use and cache the library."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_logger = logging.getLogger("elfatt")


@lru_cache(maxsize=1)
def unavailable_reason() -> str | None:
    """Return why the kernels cannot run on this machine, or None. May compile them on first use."""
    try:
        library()
    except RuntimeError as error:
        return str(error)
    except OSError as error:
        return f"{error} (remove it, or choose another cache folder with XDG_CACHE_HOME)"
    return None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Load the kernels, compiling them if they are not cached.

    Raises:
        RuntimeError: No compiler was found, or compilation failed.
        OSError: The cache is not writable, or the library cannot be loaded.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or ""]
    if not compiler[0]:
        raise RuntimeError("no C++ compiler found: install g++ or set CXX")
    # predefined macros identify compiler and CPU features: machines may share a cache
    macros = _run(*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    texts = [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*"))]
    key = hashlib.sha256(b"".join([*texts, macros.encode(), repr(FLAGS).encode()])).hexdigest()[:16]
    path = cache_folder() / f"kernels-{key}.so"
    if not path.exists():
        _logger.warning("compiling the C++ kernels for this CPU (once): %s", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
            _run(*compiler, *FLAGS, "-c", str(FOLDER / "kernels.cpp"), "-o", compiled)
            # not linked against OpenMP: uses the runtime, and so the thread pool, loaded by PyTorch
            _run(*compiler, "-shared", compiled, "-o", linked)
            os.replace(linked, path)  # atomic, as other processes may compile too
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """Return the cache folder: ``elfatt`` in XDG_CACHE_HOME (default: ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elfatt"


def _run(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"the C++ compiler {command[0]} cannot be run: {error}") from None
    if done.returncode:
        message = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise RuntimeError(f"the C++ compiler {command[0]} failed: {message}")
    return done.stdout
