"""The documentation: the site builds, its feature matrix is true, and programs understand every command in it."""

import functools
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import elfatt
from elfatt.analysis import __main__ as analysis
from elfatt.export import __main__ as export
from elfatt.ops import BACKENDS, get_backend, use_backend
from elfatt.ops.fused import FusedBackend

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPORTABLE = [name for name in BACKENDS[1:] if not get_backend(name).devices or "cpu" in get_backend(name).devices]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text() for path in (tmp_path / "site").rglob("index.html")}
    matrix = pages[tmp_path / "site" / "features" / "index.html"]
    assert all(f"<code>{name}</code>" in matrix for name in BACKENDS)
    assert 'id="elfatt.ops.elfatt_attention"' in pages[tmp_path / "site" / "api" / "ops" / "index.html"]


@pytest.mark.parametrize("name", EXPORTABLE)
def test_the_feature_matrix_is_true(name):
    """Every backend compiles to one graph; fused ones export custom operators and refuse torch.func."""
    backend = get_backend(name)
    layer = elfatt.create_attention("elfatt", dim=16, num_heads=2, block_size=2)
    x = torch.randn(1, 4, 4, 16)
    with use_backend(name):
        expected = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        program = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(compiled, expected)
    custom = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("elfatt")}
    assert bool(custom) == isinstance(backend, FusedBackend)
    for dtype in backend.dtypes or (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        with use_backend(name):
            assert layer.to(dtype)(x.to(dtype)).dtype == dtype
    gradient = torch.func.grad(lambda x: layer(x).sum())
    layer.float()
    refused = pytest.raises(ValueError, match="not torch.func or forward-mode AD")
    with use_backend(name), refused if isinstance(backend, FusedBackend) else nullcontext():
        gradient(x)


# commands

PARSERS = {"elfatt.analysis": analysis.build_parser, "elfatt.export": export.build_parser}
VALUES = {
    "CONFIG": "configs/classification/digits_vit.yaml",
    "DATA": "data",
    "FILE": "weights.pth",
    "NGPUS": "2",
}


def find_commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(\w+=\S+ )*(python|bash) ", line):
                    yield pytest.param(line, id=f"{page.stem}: {' '.join(line.split())[:60]}")


@pytest.mark.parametrize("line", list(find_commands()))
def test_a_program_understands_each_command(line, tmp_path, monkeypatch):
    """Runs it with a Python that only writes down what it is called with."""
    log = tmp_path / "log"
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text("")
    (tmp_path / "bin").mkdir()
    for name in ("python", "ruff"):
        tool = tmp_path / "bin" / name
        tool.write_text(
            f'#!/bin/bash\n[[ $1 == -c ]] && echo 1 && exit\nprintf "%s\\x1f" "$@" >> {log}; echo >> {log}\n'
        )
        tool.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(tmp_path / "bin")
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path), **VALUES}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [call.split("\x1f")[:-1] for call in log.read_text().splitlines()]
    assert calls
    monkeypatch.chdir(tmp_path)
    for call in calls:
        understand(call)


def understand(call):
    if "elfatt.launch" in call:
        call = call[call.index("-m", 2) :]
    if call[:1] != ["-m"]:
        return
    module, argv = call[1], call[2:]
    if module in PARSERS:
        PARSERS[module]().parse_args(argv)
    elif module.split(".")[0] in ("classification", "segmentation", "detection", "scripts"):
        check_options(module, argv)
    else:
        assert module == "pytest"


def check_options(module, argv):
    """The program exists, its help names every option of the command, and the files of the repository exist."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert path.exists()
    for value in argv:
        if value.startswith("configs/"):
            assert (ROOT / value).exists(), value
    options = {value for value in argv if value.startswith("--")}
    if options and not module.startswith("scripts."):
        text = help_of(module)
        assert not [option for option in options if option not in text]


@functools.cache
def help_of(module):
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
