"""The scripts as modules, and a small folder of scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory) -> Path:
    """12 training and 6 held-out scenes; read only."""
    from scripts.quickstart.scenes import write_scenes

    root = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(root, train=12, val=6)
    return root
