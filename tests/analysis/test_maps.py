"""The ``maps`` command: Score-CAM and attention maps, on nano models and drawn images."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from elfatt.analysis import maps
from elfatt.analysis.__main__ import main
from elfatt.analysis.approximation import attention_map, layer_qkv

ROOT = Path(__file__).resolve().parents[2]
VANILLA = "cswin_nano_elfatt:levels=VVVV:num_classes=3"
ELFATT = "cswin_nano_elfatt:num_classes=3"
CLASSES = {"cat": 0, "dog": 1, "fish": 2}


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).resize((96, 64)).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    model = timm.create_model("cswin_nano_elfatt", levels="VVVV", num_classes=3)
    torch.save({"state_dict": model.state_dict(), "class_to_idx": CLASSES}, tmp_path / "vanilla.pt")
    return tmp_path / "vanilla.pt"


def test_pictures_and_page(image, checkpoint, tmp_path):
    (tmp_path / "folder").mkdir()
    Image.open(image).rotate(90, expand=True).save(tmp_path / "folder" / "second.png")
    other = tmp_path / "elfatt.pt"
    torch.save(timm.create_model("cswin_nano_elfatt", num_classes=3).state_dict(), other)
    argv = ["maps", str(image), str(tmp_path / "folder"), "--models", VANILLA, ELFATT]
    output = tmp_path / "out" / "maps.png"
    assert main([*argv, "--checkpoints", str(checkpoint), str(other), "--side", "64", "--output", str(output)]) == 0
    assert np.asarray(Image.open(output).convert("L")).std() > 5
    page = output.with_suffix(".html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 2 * (1 + 2 * 5)
    assert "http:" not in page and "https:" not in page
    assert len(re.findall(r"r = -?[01]\.\d\d", page)) == 2 * 5  # of ELFATT's; vanilla is the reference
    assert "cat " in page and "class 0 " in page and "second" in page


def test_a_dense_model_loads_a_checkpoint_of_any_kind(tmp_path):
    pytest.importorskip("mmseg")
    from elfatt.integrations.mm_models import load_model

    config = ROOT / "configs" / "segmentation" / "scenes_nano.py"
    segmentor = load_model(config, "cpu")
    classifier = timm.create_model("cswin_nano_elfatt", num_classes=3)
    torch.save({"state_dict": segmentor.state_dict()}, tmp_path / "segmentor.pth")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    for name, source in (("segmentor", segmentor.backbone.features.model), ("classifier", classifier)):
        loaded = maps.load(str(config), tmp_path / f"{name}.pth").model.features.model
        torch.testing.assert_close(loaded.stem.conv.weight, source.stem.conv.weight)


def test_maps_are_those_of_the_layers(image, checkpoint):
    subject = maps.load(VANILLA, checkpoint)
    picture = Image.open(image)
    (row,) = maps.picture_rows([subject], picture, query=(0.5, 0.25), cam=False)
    assert [p.title for p in row] == ["stage 1", "stage 2", "stage 3", "stage 4"]
    assert row[2].heat.shape == (4, 6) and row[2].query == (2, 1)
    q, k, _ = layer_qkv(subject.model, "stages.2.blocks.1.attn", maps.normalise(picture, subject.model))
    expected = attention_map(subject.model.stages[2].blocks[1].attn, q, k)[0].mean(0)[2 * 6 + 1]
    torch.testing.assert_close(torch.from_numpy(row[2].heat).flatten(), expected)


def test_without_a_query_the_most_attended_token_of_the_reference_is_shown(image, checkpoint):
    subjects = [maps.load(ELFATT, None), maps.load(VANILLA, checkpoint)]
    picture = Image.open(image)
    rows = maps.picture_rows(subjects, picture, cam=False)
    q, k, _ = layer_qkv(subjects[1].model, "stages.3.blocks.0.attn", maps.normalise(picture, subjects[1].model))
    received = attention_map(subjects[1].model.stages[3].blocks[0].attn, q, k)[0].mean(0).sum(0)
    most = divmod(received.argmax().item(), 3)
    assert rows[0][3].query == rows[1][3].query == most
    assert rows[1][3].r is None and -1 <= rows[0][3].r <= 1


def test_score_cam_finds_what_the_class_depends_on():
    """A model whose only class is the brightness of the left half."""

    class Left(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(100.0))
            self.stages = torch.nn.Sequential(Parts())

        def forward(self, x):
            self.stages(x)
            return torch.stack([self.scale * x[..., : x.shape[-1] // 2].mean((1, 2, 3)), torch.zeros(len(x))], 1)

    class Parts(torch.nn.Module):  # two channels: left and right
        def forward(self, x):
            left = torch.zeros(len(x), 4, 4, 2)
            left[:, :, :2, 0] = left[:, :, 2:, 1] = 1
            return left

    found = maps.score_cam(maps.Subject("left", Left(), classes={0: "bright"}), torch.ones(1, 3, 32, 32))
    assert found.caption.startswith("bright 100%")
    assert found.heat[:, :12].mean() > 0.9 and found.heat[:, 20:].mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "cswin_nano_elfat"], "did you mean 'cswin_nano_elfatt'?"),
        (["--models", "convnext_tiny"], "convnext_tiny has no attention layers of this package"),
        (["--models", ELFATT, "--output", "x.jpg"], "--output x.jpg must end in .png"),
        (["--models", ELFATT, "--checkpoints", "a", "b"], "2 --checkpoints for 1 --models: pass one per model"),
        (["--models", ELFATT, "--side", "8"], "--side must be at least 64, got 8"),
        (["--models", ELFATT, "--query", "96", "0"], "--query 96 0 is outside an image of 96×64 pixels"),
    ],
)
def test_command_names_what_is_wrong(options, message, image, capsys):
    assert main(["maps", str(image), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_other_options_is_noticed(tmp_path, capsys):
    model = timm.create_model("cswin_nano_elfatt", block_size=4, num_classes=2)
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": model.state_dict(), "args": {"model_kwargs": {"block_size": 4}}}, path)
    maps.load("cswin_nano_elfatt:num_classes=2:block_size=4", path)
    assert not capsys.readouterr().err
    maps.load("cswin_nano_elfatt:num_classes=2", path)
    assert "cswin_nano_elfatt:num_classes=2: the checkpoint was trained with other" in capsys.readouterr().err
