"""Before any test, and around each."""

import sys

import pytest
import torch

from elfatt import ops

# compiles now, so that a test that hides the compiler does not affect the others
ops.get_backend("cpp").unsupported_reason(torch.empty(1, 1, 1, 1))


def pytest_collection_modifyitems(items):
    """Mark tests that load native runtimes (ONNX Runtime, OpenVINO), next to which other tests have crashed."""
    for item in items:
        if "export" in item.path.parts:
            item.add_marker("native")


@pytest.fixture(autouse=True)
def default_backend():
    """The programs choose one for the whole process; the next test has the old one again."""
    name = ops.active_backend()
    yield
    ops.set_default_backend(name)


@pytest.fixture(autouse=True)
def seed():
    """A test draws the same numbers in every run and order."""
    torch.manual_seed(0)


@pytest.fixture
def backends_run(monkeypatch):
    """Names of the backends that operations have run on."""
    names = set()

    def resolve(*args):
        found = ops.dispatch.resolve(*args)
        names.add(found.name)
        return found

    for module in ("agent", "block", "depthwise", "efficient", "elfatt", "scan", "softmax"):
        monkeypatch.setattr(f"elfatt.ops.{module}.resolve", resolve)
    return names


@pytest.fixture(autouse=True)
def plain_configs(monkeypatch):
    """mmengine formats the config with yapf for each log and checkpoint, which takes most of a small run."""
    if "mmengine.config" in sys.modules:
        monkeypatch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **options: (text, True))
