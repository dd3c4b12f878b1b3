"""Exported graphs give PyTorch's outputs, for every mechanism on both backbones and sizes they were not traced at."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import elfatt
from elfatt.backbones.zoo import model_options
from elfatt.export import check, export, export_model, runtimes, size_limit
from elfatt.export.__main__ import calibration_images, main
from elfatt.integrations.mm_models import load_model

ROOT = Path(__file__).resolve().parents[2]

SHELLS = ("swin", "cswin")
STRIPED = {("cswin", "local"), ("cswin", "agent"), ("cswin", "flatten")}  # for one size only
MECHANISMS = ("elfatt", "effatt", "global", "local", "agent", "flatten")
MODELS = [(shell, mechanism) for shell in SHELLS for mechanism in MECHANISMS]


def build(shell: str, mechanism: str) -> torch.nn.Module:
    published = model_options(f"{shell}_tiny_{mechanism}")
    options = {key: published[key] for key in ("attention", "levels", "stem", "agents", "window_size")}
    torch.manual_seed(0)
    model = timm.create_model(f"{shell}_nano_elfatt", **options, block_size=7, num_classes=10)
    for parameter in model.parameters():  # large outputs, in which a wrong path shows
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim < 2 else torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("shell", "mechanism"), MODELS)
def test_every_mechanism_in_onnx_and_torch_export(shell, mechanism, tmp_path, monkeypatch):
    model = build(shell, mechanism)
    size = (96, 120) if (shell, mechanism) in STRIPED else None
    monkeypatch.setattr(check, "export_model", functools.cache(export_model))
    for runtime, name in (("torch-export", "model.pt2"), ("onnx", "model.onnx")):
        found = export(model, runtime, tmp_path / name, size)
        assert len({shape for shape, _ in found}) == 3  # batches, and sizes where they are dynamic
        assert max(difference for _, difference in found) <= 1e-4
        assert [file.name for file in tmp_path.iterdir() if file.suffix == (tmp_path / name).suffix] == [name]


def test_the_graph_is_plain(tmp_path):
    import onnx

    runtimes.write_onnx(export_model(build("cswin", "elfatt")), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert not {"Cast", "Constant", "Identity"} & {node.op_type for node in graph.graph.node}  # simplified
    assert not graph.functions
    attention = [node for node in graph.graph.node if node.op_type == "Softmax"]
    assert len(attention) == 3 * 3 + 2  # two softmaxes of the global branch and one of the local; two vanilla blocks


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    chosen = runtimes.RUNTIMES["torch-export"]
    broken = lambda path: lambda images: chosen.load(path)(images) + 1  # noqa: E731
    monkeypatch.setitem(runtimes.RUNTIMES, "torch-export", chosen._replace(load=broken))
    with pytest.raises(RuntimeError, match="was not written"):
        export(build("cswin", "effatt"), "torch-export", tmp_path / "model.pt2", (64, 64))

    def fail(path):
        raise LookupError("of its own\ntype")

    monkeypatch.setitem(runtimes.RUNTIMES, "torch-export", chosen._replace(load=fail))
    with pytest.raises(RuntimeError, match="torch-export cannot run the model: of its own type"):
        export(build("cswin", "effatt"), "torch-export", tmp_path / "model.pt2", (64, 64))
    assert not list(tmp_path.iterdir())


def test_the_limit_follows_the_blocks():
    assert size_limit(timm.create_model("cswin_tiny_elfatt")) == 13 * 16 + 1
    assert size_limit(timm.create_model("swin_tiny_local")) == 7 * 32 + 1
    assert size_limit(timm.create_model("cswin_tiny_effatt")) == 64


def test_command(tmp_path, capsys):
    path = tmp_path / "model.xml"
    command = ["cswin_nano_elfatt", "--to", "openvino", "--num-classes", "3", "--size", "64", "96"]
    assert main([*command, "--output", str(path)]) == 0
    assert "1×3×64×96: differs" in capsys.readouterr().out
    assert path.with_suffix(".bin").exists()
    assert runtimes.load_openvino(path)(torch.zeros(2, 3, 64, 96)).shape == (2, 3)
    assert main(["cswin_nano_elfat", "--to", "onnx"]) == 1
    assert "did you mean" in capsys.readouterr().err
    assert main(["cswin_tiny_local", "--to", "onnx"]) == 1
    assert "fixed image size" in capsys.readouterr().err
    assert main(["resnet18", "--to", "onnx"]) == 1
    assert "fixed image size" in capsys.readouterr().err


def test_a_segmentor(tmp_path, capsys):
    config = str(ROOT / "configs" / "segmentation" / "scenes_nano.py")
    model = load_model(Path(config), "cpu")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    path, size = tmp_path / "model.onnx", ["--size", "64", "96"]
    argv = [config, "--to", "onnx", "--checkpoint", str(tmp_path / "model.pth"), "--output", str(path)]
    assert main([*argv, *size]) == 0
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image, None, mode="tensor").numpy()
    np.testing.assert_allclose(runtimes.load_onnx(path)(image), expected, atol=1e-4)
    assert main(argv) == 1 and "pass --size" in capsys.readouterr().err
    assert main([str(ROOT / "configs" / "detection" / "scenes_nano.py"), "--to", "onnx", *size]) == 1
    assert "is a detector" in capsys.readouterr().err
    assert main([config, "--to", "onnx", *size, "--num-classes", "3"]) == 1
    assert "--num-classes do not apply" in capsys.readouterr().err


def write_classes(folder, count=6):
    """Two classes: images brighter on the left, and on the right."""
    generator = np.random.default_rng(0)
    for label in ("left", "right"):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 60, (64, 64, 3))
            pixels[:, :32] += 150 * (label == "left")
            pixels[:, 32:] += 150 * (label == "right")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


def train_a_little(data):
    model = timm.create_model("cswin_nano_elfatt", num_classes=2)
    transform = create_transform((3, 64, 64), crop_pct=1.0)
    files = [(transform(Image.open(f)), int(f.parent.name == "right")) for f in sorted(data.rglob("*.png"))]
    images, labels = torch.stack([image for image, _ in files]), torch.tensor([label for _, label in files])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_precisions_keep_the_accuracy(runtime, precision, tmp_path, capsys):
    data = write_classes(tmp_path / "data")
    torch.save(train_a_little(data).state_dict(), tmp_path / "model.pt")
    path = tmp_path / f"model{runtimes.RUNTIMES[runtime].suffix}"
    command = ["cswin_nano_elfatt", "--num-classes", "2", "--checkpoint", str(tmp_path / "model.pt"), "--to", runtime]
    options = ["--size", "64", "64", "--precision", precision, "--evaluate", str(data), "--output", str(path)]
    calibration = ["--calibration", str(data), "--images", "8"] if precision == "int8" else []
    assert main([*command, *options, *calibration]) == 0
    assert f"top-1 on 12 images: PyTorch 100.00%, {runtime} {precision} 100.00%" in capsys.readouterr().out
    weights = path.with_suffix(".bin") if runtime == "openvino" else path
    full = tmp_path / "model.pt"
    assert weights.stat().st_size < {"fp16": 0.65, "int8": 0.5}[precision] * full.stat().st_size


STAND_IN = """#!{python}
import json, shutil, sys
import numpy as np, onnxruntime
options = dict(option.lstrip("-").partition("=")[::2] for option in sys.argv[1:])
if "onnx" in options:
    assert options["minShapes"] == "image:1x3x64x64" and options["maxShapes"] == "image:128x3x64x64"
    assert options["optShapes"] == "image:4x3x64x64" and "noTF32" in options
    shutil.copy(options["onnx"], options["saveEngine"])
else:
    shape = [int(n) for n in options["shapes"].split(":")[1].split("x")]
    image = np.fromfile(options["loadInputs"].split(":")[1], np.float32).reshape(shape)
    (out,) = onnxruntime.InferenceSession(options["loadEngine"]).run(None, {{"image": image}})
    values = {{"name": "output", "dimensions": "x".join(map(str, out.shape)), "values": out.ravel().tolist()}}
    json.dump([values], open(options["exportOutput"], "w"))
"""


def test_tensorrt_is_asked_for_an_engine_and_its_outputs(tmp_path, monkeypatch):
    program = tmp_path / "trtexec"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    model = timm.create_model("cswin_nano_elfatt", num_classes=2)
    with pytest.raises(RuntimeError, match="tensorrt needs trtexec"):
        export(model, "tensorrt", tmp_path / "model.engine", (64, 64))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = export(model, "tensorrt", tmp_path / "model.engine", (64, 64), batch_size=4)
    assert max(difference for _, difference in found) < 1e-5
    with pytest.raises(RuntimeError, match="trtexec failed"):  # the stand-in takes one size alone
        export(model, "tensorrt", tmp_path / "other.engine", (96, 64))
    assert not (tmp_path / "other.engine").exists()


def test_int8_of_no_finite_output_is_not_written(tmp_path, monkeypatch):
    broken = runtimes.RUNTIMES["onnx"]._replace(load=lambda path: lambda images: np.full((len(images), 2), np.nan))
    monkeypatch.setitem(runtimes.RUNTIMES, "onnx", broken)
    model, images = timm.create_model("cswin_nano_elfatt", num_classes=2), [torch.randn(1, 3, 64, 64)]
    with pytest.raises(RuntimeError, match="onnx in int8 gives NaN or infinite outputs on .*: use fp32"):
        export(model, "onnx", tmp_path / "model.onnx", (64, 64), "int8", images)
    assert not (tmp_path / "model.onnx").exists()


def test_a_converted_model_at_one_size_and_the_state_of_training(tmp_path):
    model = timm.create_model("cswin_nano_elfatt", num_classes=2).train()
    with elfatt.convert(model, block=2):
        with pytest.raises(ValueError, match="a converted model supports a fixed image size only"):
            export(model, "torch-export", tmp_path / "model.pt2")
        found = export(model, "torch-export", tmp_path / "model.pt2", (64, 96))
    assert max(difference for _, difference in found) < 1e-5
    assert model.training and model.stages[0].training and all(p.requires_grad for p in model.parameters())


def test_calibration_images_are_spread_over_the_folder(tmp_path):
    for number in range(7):
        Image.new("L", (1, 1), number).save(tmp_path / f"{number}.png")
    images = calibration_images(tmp_path, lambda image: torch.tensor(float(np.asarray(image).max())), 4)
    assert [image.item() for image in images] == [0, 1, 3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "coreml"], "coreml cannot run these models: its tensors have at most five dimensions"),
        (["--to", "onnx", "--evaluate", "nowhere"], "--evaluate nowhere is not a folder"),
        (["--to", "torch-export", "--precision", "int8"], "torch-export does not support int8: choose one of fp32"),
        (["--to", "onnx", "--precision", "int8"], "int8 needs calibration images"),
        (["--to", "executorch"], "executorch in fp32 needs executorch: pip install executorch"),
        (["--to", "onnx", "--calibration", "{data}"], "--calibration is for int8, not fp32: pass --precision int8"),
        (["--to", "onnx", "--batch-size", "8"], "--batch-size is for tensorrt, not onnx: omit it"),
        (["--to", "tensorrt", "--batch-size", "129"], "tensorrt supports batches of up to 128, not 129"),
        (["--to", "onnx", "--evaluate", "{data}"], "{data} has 2 classes, the model 1000: pass --num-classes 2"),
    ],
)
def test_command_names_what_is_wrong(options, message, tmp_path, capsys):
    data = write_classes(tmp_path / "data", count=1)
    options = [option.format(data=data) for option in options]
    assert main(["cswin_nano_elfatt", "--size", "64", "64", *options]) == 1
    assert message.format(data=data) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "0"], "argument --images: 0 is below 1"),
        (["--images", "x"], "argument --images: 'x' is not a whole number"),
        (["--size", "-5", "7"], "argument --size: -5 is below 1"),
        (["--model-kwargs", "block_size"], "--model-kwargs: expected KEY=VALUE, got 'block_size'"),
    ],
)
def test_command_refuses_malformed_options(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["cswin_nano_elfatt", "--to", "onnx", *options])
    assert message in capsys.readouterr().err


def test_only_float32_on_the_cpu_is_exported(tmp_path):
    with pytest.raises(ValueError, match="not torch.float16 on cpu: call model.float"):
        export(timm.create_model("cswin_nano_elfatt").half(), "torch-export", tmp_path / "model.pt2")


def test_images_below_the_limit_are_refused_before_the_work(tmp_path, capsys):
    data = write_classes(tmp_path / "data", count=1)
    assert main(["swin_nano_elfatt", "--to", "onnx", "--evaluate", str(data), "--model-kwargs", "block_size=28"]) == 1
    assert "images of 224 pixels are below the minimum of 433: pass --size 224 224" in capsys.readouterr().err
    assert main(["resnet18", "--to", "onnx", "--evaluate", str(data)]) == 1
    assert "ResNet supports a fixed image size only: pass size (--size)" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_large_weights_lie_in_a_file_of_their_own(precision, tmp_path, monkeypatch):
    """As those over 1.5 GiB, since an .onnx file holds up to 2 GiB."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Flatten(), torch.nn.Linear(128, 2048))
    images, path = [torch.randn(1, 3, 32, 32) for _ in range(2)], tmp_path / "model.onnx"
    monkeypatch.setattr("elfatt.export.runtimes.LARGE", 1 << 20)
    export(model, "onnx", path, (32, 32), precision, images)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    weights = sum(parameter.numel() for parameter in model.parameters())
    held = (tmp_path / "model.onnx.data").stat().st_size / weights
    low = {"fp32": 3.9, "fp16": 1.9, "int8": 0.9}[precision]
    assert low < held < 1.25 * low  # each once, not beside the float32 ones


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_exports_the_same(dtype, tmp_path):
    model = timm.create_model("cswin_nano_elfatt", num_classes=3, img_size=32, depths=(1, 1, 1, 1))
    torch.set_default_dtype(dtype)
    try:
        found = export(model, "torch-export", tmp_path / "model.pt2", (64, 64))
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(difference < 1e-5 for _, difference in found)
