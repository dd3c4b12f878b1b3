"""Recognise compressed files, whatever their name."""

from __future__ import annotations

import os

_SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}


def compression_of(path: str | os.PathLike) -> str | None:
    """Return the format of a compressed file, or None if it is not compressed."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for signature, name in _SIGNATURES.items() if start.startswith(signature)), None)
