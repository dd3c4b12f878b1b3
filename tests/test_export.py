"""Exported graphs give PyTorch's outputs, for every mechanism on both backbones and sizes they were not traced at."""

import functools

import pytest
import timm
import torch

from elfatt import export
from elfatt.backbones.zoo import ATTENTIONS

SHELLS = ("swin", "cswin")
STRIPED = {("cswin", "local"), ("cswin", "agent"), ("cswin", "flatten")}  # for one size only
MODELS = [(shell, mechanism) for shell in SHELLS for mechanism in ATTENTIONS]


def build(shell: str, mechanism: str) -> torch.nn.Module:
    options = ATTENTIONS[mechanism]
    torch.manual_seed(0)
    model = timm.create_model(
        f"{shell}_nano_elfatt",
        attention=options["attention"],
        levels=options[shell],
        stem="conv" if shell == "cswin" or mechanism == "elfatt" else "patch",
        block_size=7,
        agents=(3, 4, 7, 7),
        window_size=7 if shell == "swin" else (1, 2, 7, 7),
        num_classes=10,
    )
    for parameter in model.parameters():  # large outputs, in which a wrong path shows
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim < 2 else torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("shell", "mechanism"), MODELS)
def test_every_mechanism_in_onnx_and_torch_export(shell, mechanism, tmp_path, monkeypatch):
    model = build(shell, mechanism)
    size = (96, 120) if (shell, mechanism) in STRIPED else None
    monkeypatch.setattr(export, "export_model", functools.cache(export.export_model))
    for runtime, name in (("torch-export", "model.pt2"), ("onnx", "model.onnx")):
        found = export.export(model, runtime, tmp_path / name, size)
        assert len({shape for shape, _ in found}) == 3  # batches, and sizes where they are dynamic
        assert max(difference for _, difference in found) <= 1e-4
        assert [file.name for file in tmp_path.iterdir() if file.suffix == (tmp_path / name).suffix] == [name]


def test_the_graph_is_plain(tmp_path):
    import onnx

    export.write_onnx(export.export_model(build("cswin", "elfatt")), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert not graph.functions
    attention = [node for node in graph.graph.node if node.op_type == "Softmax"]
    assert len(attention) == 3 * 3 + 2  # two softmaxes of the global branch and one of the local; two vanilla blocks


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    packages, suffix, write, load = export.RUNTIMES["torch-export"]
    broken = lambda path: lambda images: load(path)(images) + 1  # noqa: E731
    monkeypatch.setitem(export.RUNTIMES, "torch-export", (packages, suffix, write, broken))
    with pytest.raises(RuntimeError, match="was not written"):
        export.export(build("cswin", "effatt"), "torch-export", tmp_path / "model.pt2", (64, 64))
    assert not list(tmp_path.iterdir())


def test_the_limit_follows_the_blocks():
    assert export.size_limit(timm.create_model("cswin_tiny_elfatt")) == 13 * 16 + 1
    assert export.size_limit(timm.create_model("swin_tiny_local")) == 7 * 32 + 1
    assert export.size_limit(timm.create_model("cswin_tiny_effatt")) == 64


def test_command(tmp_path, capsys):
    path = tmp_path / "model.xml"
    command = ["cswin_nano_elfatt", "--to", "openvino", "--num-classes", "3", "--size", "64", "96"]
    assert export.main([*command, "--output", str(path)]) == 0
    assert "1×3×64×96: differs" in capsys.readouterr().out
    assert path.with_suffix(".bin").exists()
    assert export.load_openvino(path)(torch.zeros(2, 3, 64, 96)).shape == (2, 3)
    assert export.main(["cswin_nano_elfat", "--to", "onnx"]) == 1
    assert "did you mean" in capsys.readouterr().err
    assert export.main(["cswin_tiny_local", "--to", "onnx"]) == 1
    assert "fixed image size" in capsys.readouterr().err
    assert export.main(["resnet18", "--to", "onnx"]) == 1
    assert "fixed image size" in capsys.readouterr().err
