"""The package as a whole: imports run downward, stay light, and work without the optional libraries."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import elfatt
from elfatt.analysis import accuracy

PACKAGE = Path(elfatt.__file__).parent
ORDER = [
    "suggest",
    "keywords",
    "console",
    "data",
    "preemption",
    "launch",
    "randomness",
    "processes",
    "ops",
    "layers",
    "attention",
    "backbones",
    "checkpoints",
]
ORDER += ["conversion", "integrations", "hub", "export", "analysis"]
OPTIONAL = {
    "mmengine",
    "mmcv",
    "mmseg",
    "mmdet",
    "diffusers",
    "tomesd",
    "transformers",
    "accelerate",
    "flash_attn",
    "triton",
    "matplotlib",
    "sklearn",
    "pytorch_grad_cam",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "executorch",
}
DISTRIBUTIONS = {"onnx_ir": "onnx-ir", "PIL": "pillow", "cv2": "onedl-mmcv", "pytorch_grad_cam": "grad-cam"}
DISTRIBUTIONS |= {name: f"onedl-{name}" for name in ("mmengine", "mmcv")}
DISTRIBUTIONS |= {"mmdet": "onedl-mmdetection", "mmseg": "onedl-mmsegmentation"}
# with torch, or only where users have them; an error names what is missing
UNDECLARED = {"triton", "flash_attn", "mamba_ssm", "executorch", "lpips", "torchmetrics"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_only_analysis_runs_the_task_folders():
    named = {
        (path.relative_to(PACKAGE).parts[0], node.value)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and re.fullmatch(r"(classification|segmentation|detection)\.\w+", str(node.value))
    }
    assert named == {("analysis", program) for program in accuracy.PROGRAMS.values()}
    assert all((PACKAGE.parent / f"{program.replace('.', '/')}.py").exists() for program in accuracy.PROGRAMS.values())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer not in ORDER:
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "elfatt" and len(parts) > 1:
            assert ORDER.index(parts[1]) <= ORDER.index(layer), f"{path} imports {name}"


def test_no_optional_library_is_imported():
    code = "import sys, elfatt, timm; print(*sorted(m.split('.')[0] for m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    light = {m for m in OPTIONAL & set(found) if m not in ("triton",)}  # torch itself imports triton where it exists
    assert not light


def test_every_import_is_declared():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {re.match(r"[\w-]+", line)[0] for line in wanted}
    roots = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for name in imports_of(path)}
    roots -= {"", "elfatt", *sys.stdlib_module_names, *UNDECLARED}
    assert {DISTRIBUTIONS.get(name, name) for name in roots} <= declared


def test_version_is_the_one_of_the_project():
    assert importlib.metadata.version("elfatt") == elfatt.__version__


def test_an_impossible_backend_in_the_environment_stops_the_import():
    environment = {**os.environ, "ELFATT_BACKEND": "fast"}
    done = subprocess.run([sys.executable, "-c", "import elfatt"], env=environment, capture_output=True, text=True)
    line = "ValueError: ELFATT_BACKEND: unknown backend 'fast': choose one of auto, "
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(line)


@pytest.mark.slow
def test_types():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
