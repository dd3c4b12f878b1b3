"""Approximation of softmax attention: matrices and figures against formulas in NumPy, and the ``error`` command."""

import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import elfatt
from elfatt.analysis.__main__ import main
from elfatt.analysis.approximation import (
    COLUMNS,
    attention_map,
    bare_attention,
    compare,
    concentration,
    entropy,
    layer_qkv,
    random_qkv,
    received_attention,
    softmax_map,
    sweep,
)

SIZE, DIM, HEADS = (4, 6), 16, 4
TOKENS = SIZE[0] * SIZE[1]
CASES = [  # none of them pads the map
    ("vanilla", {"lepe": False}),
    ("effatt", {"lepe": False}),
    ("elfatt", {"lepe": False, "block_size": 2}),
    ("elfatt", {"lepe": False, "block_size": 2, "channel_split": 0}),
    ("elfatt", {"lepe": False, "block_size": 2, "channel_split": 0.25}),
    ("swin", {"window_size": 2, "shifted": True}),
    ("cswin", {"lepe": False, "stripe": 2}),
    ("agent", {"lepe": False, "agents": 2}),
    ("flatten", {}),
]


@pytest.fixture
def qkv():
    return random_qkv(SIZE, DIM, images=2)


def build(name, options):
    """A mechanism with its position terms as they begin, and without convolutions."""
    torch.manual_seed(0)
    attention = elfatt.create_attention(name, dim=DIM, num_heads=HEADS, **options)
    if name == "flatten":
        torch.nn.init.zeros_(attention.dwc.weight)
        torch.nn.init.zeros_(attention.dwc.bias)
    return attention


def softmax(x, axis):
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def heads_of(x, width):
    """The first image's heads as matrices [N, width]."""
    return [part.numpy() for part in x[0].flatten(0, 1).split(width, -1)]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_maps_times_values_are_the_output_and_rows_are_averages(name, options, qkv):
    attention = build(name, options)
    maps = attention_map(attention, *qkv[:2])
    assert maps.dtype == torch.float64 and maps.shape == (2, HEADS, TOKENS, TOKENS)
    assert maps.min() >= 0
    sums = maps.sum(-1)
    if name == "flatten":  # a denominator of 1e-6 and more: a query that nothing answers has next to no weights
        assert sums.max() < 1 and sums.median() > 1 - 1e-4
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    share = options.get("channel_split", 0.5) if name == "elfatt" else 0
    first = round(DIM * share)
    widths = [first // 2] * 2 + [(DIM - first) // 2] * 2 if first else [DIM // HEADS] * HEADS
    found = torch.cat([maps[:, i] @ v for i, v in enumerate(qkv[2].flatten(1, 2).split(widths, -1))], -1)
    with torch.no_grad():
        expected = attention.double().attend(torch.cat(qkv, -1))
    torch.testing.assert_close(found, expected.flatten(1, 2), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("name", "options"), [*CASES, ("elfatt", {"block_size": 5}), ("swin", {"window_size": 5})])
def test_received_attention_is_a_row_of_the_map_or_their_sum(name, options, qkv):
    attention = bare_attention(name, DIM, HEADS, **options)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.1)
    exact = attention_map(attention, *qkv[:2])
    torch.testing.assert_close(received_attention(attention, *qkv[:2], query=7), exact[:, :, 7])
    torch.testing.assert_close(received_attention(attention, *qkv[:2]), exact.sum(2))


def test_maps_of_vanilla_and_efficient_attention_are_their_formulas(qkv):
    vanilla = attention_map(bare_attention("vanilla", DIM, HEADS), *qkv[:2])[0]
    efficient = attention_map(bare_attention("effatt", DIM, HEADS), *qkv[:2])[0]
    for i, (q, k) in enumerate(zip(*(heads_of(x, 4) for x in qkv[:2]), strict=True)):
        np.testing.assert_allclose(vanilla[i], softmax(q @ k.T / 2, -1), rtol=1e-12)
        np.testing.assert_allclose(efficient[i], softmax(q, -1) @ softmax(k, 0).T, rtol=1e-12)


def test_branches_of_elfatt_have_their_own_maps_and_scale(qkv):
    attention = bare_attention("elfatt", DIM, HEADS, block_size=2, channel_split=0.25)
    found, exact = attention_map(attention, *qkv[:2])[0], softmax_map(attention, *qkv[:2])[0]
    q, k = (heads_of(x[..., :4], 2) for x in qkv[:2])
    row, column = torch.arange(TOKENS) // SIZE[1] // 2, torch.arange(TOKENS) % SIZE[1] // 2
    same_block = ((row[:, None] == row) & (column[:, None] == column)).numpy()
    for i in range(2):
        np.testing.assert_allclose(found[i], softmax(q[i], -1) @ softmax(k[i], 0).T, rtol=1e-12)
        np.testing.assert_allclose(exact[i], softmax(q[i] @ k[i].T / 2**0.5, -1), rtol=1e-12)
    q, k = (heads_of(x[..., 4:], 6) for x in qkv[:2])
    for i in range(2):
        scores = q[i] @ k[i].T / 6**0.5
        np.testing.assert_allclose(found[2 + i], softmax(np.where(same_block, scores, -np.inf), -1), rtol=1e-12)
        np.testing.assert_allclose(exact[2 + i], softmax(scores, -1), rtol=1e-12)


def test_padding_takes_its_share_of_the_weight():
    q, k, _ = random_qkv((3, 3), DIM)
    maps = attention_map(bare_attention("elfatt", DIM, HEADS, block_size=2, channel_split=0), q * 0, k)
    # a corner's block has four places: one token and three of padding, all scores zero
    torch.testing.assert_close(maps[0, 0].sum(-1), torch.tensor([1, 1, 0.5, 1, 1, 0.5, 0.5, 0.5, 0.25]).double())
    torch.testing.assert_close(attention_map(bare_attention("swin", DIM, HEADS, window_size=2), q * 0, k), maps)


def test_convolutions_are_left_out_and_the_module_is_untouched(qkv):
    attention = build("elfatt", {"block_size": 2})
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    bare = bare_attention("elfatt", DIM, HEADS, block_size=2)
    torch.testing.assert_close(attention_map(attention, *qkv[:2]), attention_map(bare, *qkv[:2]), atol=0, rtol=0)
    torch.testing.assert_close(attention.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("block_size", [6, 14])
def test_one_block_is_softmax_attention(block_size, qkv):
    found = compare(bare_attention("elfatt", DIM, HEADS, block_size=block_size, channel_split=0), *qkv)
    softmax_attention = compare(bare_attention("vanilla", DIM, HEADS), *qkv)
    errors = [name for name in COLUMNS if "_" in name]
    assert len(errors) == 4 and all(found[name] < 1e-14 for name in errors)
    assert found["entropy"] == pytest.approx(softmax_attention["entropy"], abs=1e-14)


def test_compare_is_the_mean_over_channels_and_images(qkv):
    attention = bare_attention("elfatt", DIM, HEADS, block_size=2, channel_split=0.25)
    found = compare(attention, *qkv)
    maps, exact = (fn(attention, *qkv[:2]).numpy() for fn in (attention_map, softmax_map))
    values = [v.numpy() for v in qkv[2].flatten(1, 2).split([2, 2, 6, 6], -1)]
    for name, order in (("frobenius", "fro"), ("spectral", 2)):
        of_map, of_output = [], []
        for image in range(2):
            for i, width in enumerate((2, 2, 6, 6)):
                one = np.linalg.norm(maps[image, i] - exact[image, i], order) / np.linalg.norm(exact[image, i], order)
                of_map += width * [one]
            a, s = (np.hstack([m[image, i] @ values[i][image] for i in range(4)]) for m in (maps, exact))
            of_output.append(np.linalg.norm(a - s, order) / np.linalg.norm(s, order))
        assert found[f"map_{name}"] == pytest.approx(np.mean(of_map), rel=1e-9)
        assert found[f"output_{name}"] == pytest.approx(np.mean(of_output), rel=1e-9)


def test_entropy_and_concentration_of_known_maps():
    uniform, one_hot = torch.full((2, 20, 20), 1 / 20).double(), torch.eye(20).double()
    assert entropy(uniform).tolist() == pytest.approx([1, 1]) and entropy(one_hot) == 0
    assert concentration(uniform).tolist() == pytest.approx([0.1, 0.1]) and concentration(one_hot) == 1
    half = torch.zeros(3, 20).double()
    half[:, :4] = 0.1  # rows that padding has left with 0.4
    assert entropy(half) == pytest.approx(math.log(4) / math.log(20)) and concentration(half) == pytest.approx(0.5)


def test_sweep_has_a_row_for_each_variant(qkv):
    rows = sweep(*qkv, num_heads=HEADS, blocks=(2, 6, 14), splits=(0, 0.5, 1))
    by_name = {(row["mechanism"], row["block_size"], row["channel_split"]): row for row in rows}
    assert len(by_name) == len(rows) == 6 + 2 + 2 + 1  # 14 is the map, as 6 is
    assert by_name["elfatt", 6, 0]["map_frobenius"] < 1e-14
    assert by_name["elfatt", None, 1]["map_frobenius"] == by_name["effatt", None, None]["map_frobenius"] > 0.01


def test_sweep_leaves_out_what_cannot_be_built(capsys):
    rows = sweep(*random_qkv(SIZE, 12), num_heads=3, blocks=(2,), splits=(0.5,))
    assert "cswin" not in [row["mechanism"] for row in rows]
    assert "skipped: cswin: num_heads=3 must be even" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4, 4, 16), (1, 4, 5, 16), (1, 4, 4, 16)], "one shape"),
        ([(1, 16, 16)] * 3, "B, H, W, C"),
        ([(1, 1, 1, 16)] * 3, "at least two tokens"),
        ([(1, 4, 4, 8)] * 3, "16 channels"),
    ],
)
def test_wrong_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message) as error:
        compare(bare_attention("vanilla", DIM, HEADS), *(torch.zeros(shape) for shape in shapes))
    assert "\n" not in str(error.value)


def test_layer_gives_what_its_mechanism_sees():
    torch.manual_seed(0)
    model = timm.create_model("swin_nano_elfatt", levels=("L", "E", "H", "V"), num_classes=0, img_size=36).eval()
    q, k, v = layer_qkv(model, "stages.0.blocks.0.attn", torch.randn(2, 3, 36, 36))
    assert q.shape == k.shape == v.shape == (2, 9, 9, 48)  # not the 14 × 14 to which windows pad it
    with pytest.raises(ValueError, match="no attention layer 'stages.9': choose one of stages.0.blocks.0.attn"):
        layer_qkv(model, "stages.9", torch.randn(1, 3, 36, 36))


def test_command_on_random_maps(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    size = ["--size", "4", "4", "--dim", "16", "--images", "1", "--blocks", "2", "4"]
    files = ["--plot", str(tmp_path / "p" / "error.png"), "--results", str(tmp_path / "results.json")]
    assert main(["error", *size, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| elfatt, c1/c = 0, block 4 | 0.000 | 0.000 | 0.000 | 0.000 |" in "\n".join(lines)
    with Image.open(tmp_path / "p" / "error.png") as picture:
        assert picture.width > 1000
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["kind"] == "error" and run["settings"]["size"] == [4, 4]
    assert len(run["rows"]) == len(lines) - 5 == 6 + 4 * 2 + 1


def test_command_on_a_layer(tmp_path, capsys):
    image, checkpoint = tmp_path / "grey.png", tmp_path / "nano.pth"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8)).save(image)
    torch.manual_seed(1)
    torch.save(timm.create_model("cswin_nano_elfatt", num_classes=7, img_size=32).state_dict(), checkpoint)
    model = ["--model", "cswin_nano_elfatt", "--model-kwargs", "block_size=4", "--checkpoint", str(checkpoint)]
    layer = ["--layer", "stages.0.blocks.0.attn", "--image", str(image), "--img-size", "32"]
    assert main(["error", *model, *layer, "--blocks", "4", "8"]) == 0
    out = capsys.readouterr().out
    assert "map 8 × 8, 32 channels" in out and "checkpoint nano.pth" in out
    figures = dict(line.strip("| ").split(" | ", 1) for line in out.splitlines() if line.startswith("| "))
    assert figures["this layer, with its position terms"] == figures["elfatt, c1/c = 0.5, block 4"]
    assert figures["elfatt, c1/c = 0.5, block 4"] != figures["elfatt, c1/c = 0.5, block 8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "cswin_tiny_elfat", "--image", "x.png"], "did you mean 'cswin_tiny_elfatt'?"),
        (["--heads", "3"], "dim=64 cannot be split into num_heads=3"),
        (["--model", "cswin_tiny_elfatt"], "--model needs an input: pass --image"),
        (["--model", "cswin_nano_elfatt", "--img-size", "32", "--image", "no.png"], "no.png"),
        (["--model", "cswin_nano_elfatt", "--image", "no.png", "--model-kwargs", "blok=4"], "--model-kwargs: "),
    ],
)
def test_command_names_what_is_wrong(options, message, capsys):
    assert main(["error", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_plot_without_matplotlib_names_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["error", "--plot", "error.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
