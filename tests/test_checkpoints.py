"""Checkpoints: official names against official arithmetic written here a second time, and every way a load can fail."""

import argparse
import logging
import math

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformer as TimmSwin

import elfatt  # noqa: F401  registers the models
from elfatt.backbones.zoo import model_options
from elfatt.checkpoints import LoadReport, convert_state_dict, load_checkpoint

SMALL = {"embed_dim": 16, "depths": (1, 2, 3, 1), "num_heads": (2, 2, 4, 4), "agents": (2, 3, 2, 2), "num_classes": 5}
WINDOWS = {"swin": 3, "cswin": (1, 2, 3, 3)}  # for an image of 96, whose maps have sides 24, 12, 6, 3
SOURCES = {
    "swin_local": "microsoft Swin",
    "cswin_local": "microsoft CSWin",
    "swin_agent": "Agent-Swin",
    "cswin_agent": "Agent-CSWin",
    "swin_flatten": "FLatten-Swin",
    "cswin_flatten": "FLatten-CSWin",
}


def small_model(name, img_size=96, **options):
    """A float64 model of the name's family whose maps are a few tokens wide."""
    shell, mechanism = name.split("_")
    options = {**SMALL, "window_size": WINDOWS[shell], "img_size": img_size, **options}
    return timm.create_model(f"{shell}_tiny_{mechanism}", **options).double().eval()


def randomized(model):
    """The model with noise on every parameter, so that no bias or norm is idle."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# ---------------------------------------------------------------- official names and shapes, from the official files


def linear_shapes(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm_shapes(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def conv_shapes(name, inputs, outputs, kernel):
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def agent_shapes(name, heads, agents, side):
    n = agents**2
    return {
        f"{name}.an_bias": (heads, n, 7, 7),
        f"{name}.na_bias": (heads, n, 7, 7),
        f"{name}.ah_bias": (1, heads, n, side, 1),
        f"{name}.aw_bias": (1, heads, n, 1, side),
        f"{name}.ha_bias": (1, heads, side, 1, n),
        f"{name}.wa_bias": (1, heads, 1, side, n),
    }


def focused_shapes(name, dim, heads, side):
    return {
        f"{name}.scale": (1, 1, dim),
        f"{name}.positional_encoding": (1, side**2, dim),
        **conv_shapes(f"{name}.dwc", 1, dim // heads, 5),
    }


def plan(name, options, img_size):
    """What each block of an official model is: a list of stages of dictionaries."""
    shell, mechanism = name.split("_")
    windows = options["window_size"]
    stages = []
    for i, depth in enumerate(options["depths"]):
        pattern = options["levels"][i]
        letters = pattern * depth if len(pattern) == 1 else pattern
        side = img_size // 2 ** (i + 2)
        window = windows if isinstance(windows, int) else windows[i]
        stages.append(
            [
                {
                    "kind": {"E": mechanism, "L": "local", "V": "full"}[letter],
                    "dim": options["embed_dim"] * 2**i,
                    "heads": options["num_heads"][i],
                    "side": side,
                    "window": window,
                    "shift": window // 2 if j % 2 and side > window else 0,
                    "agents": options["agents"][i],
                }
                for j, letter in enumerate(letters)
            ]
        )
    return stages


def swin_shapes(stages, num_classes):
    dim = stages[0][0]["dim"]
    shapes = conv_shapes("patch_embed.proj", 3, dim, 4) | norm_shapes("patch_embed.norm", dim)
    for i, stage in enumerate(stages):
        for j, block in enumerate(stage):
            name, dim, heads, window = f"layers.{i}.blocks.{j}", block["dim"], block["heads"], block["window"]
            shapes |= norm_shapes(f"{name}.norm1", dim) | norm_shapes(f"{name}.norm2", dim)
            shapes |= linear_shapes(f"{name}.mlp.fc1", dim, 4 * dim) | linear_shapes(f"{name}.mlp.fc2", 4 * dim, dim)
            shapes |= linear_shapes(f"{name}.attn.qkv", dim, 3 * dim) | linear_shapes(f"{name}.attn.proj", dim, dim)
            if block["kind"] == "agent":
                shapes |= agent_shapes(f"{name}.attn", heads, block["agents"], block["side"])
                shapes |= conv_shapes(f"{name}.attn.dwc", 1, dim, 3)
            elif block["kind"] == "flatten":
                shapes |= focused_shapes(f"{name}.attn", dim, heads, block["side"])
            else:
                shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
                shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
                if block["shift"]:
                    shapes[f"{name}.attn_mask"] = ((block["side"] // window) ** 2, window**2, window**2)
        if i + 1 < len(stages):
            shapes |= norm_shapes(f"layers.{i}.downsample.norm", 4 * dim)
            shapes |= linear_shapes(f"layers.{i}.downsample.reduction", 4 * dim, 2 * dim, bias=False)
    return shapes | norm_shapes("norm", dim) | linear_shapes("head", dim, num_classes)


def cswin_shapes(stages, num_classes):
    dim = stages[0][0]["dim"]
    shapes = conv_shapes("stage1_conv_embed.0", 3, dim, 7) | norm_shapes("stage1_conv_embed.2", dim)
    for i, stage in enumerate(stages, start=1):
        for j, block in enumerate(stage):
            name, dim, heads = f"stage{i}.{j}", block["dim"], block["heads"]
            shapes |= norm_shapes(f"{name}.norm1", dim) | norm_shapes(f"{name}.norm2", dim)
            shapes |= linear_shapes(f"{name}.mlp.fc1", dim, 4 * dim) | linear_shapes(f"{name}.mlp.fc2", 4 * dim, dim)
            shapes |= linear_shapes(f"{name}.qkv", dim, 3 * dim) | linear_shapes(f"{name}.proj", dim, dim)
            if block["kind"] == "local":
                for branch in (0, 1):
                    shapes |= conv_shapes(f"{name}.attns.{branch}.get_v", 1, dim // 2, 3)
                continue
            shapes |= conv_shapes(f"{name}.attns.0.get_v", 1, dim, 3)
            if block["kind"] == "agent":
                shapes |= agent_shapes(f"{name}.attns.0", heads, block["agents"], block["side"])
            elif block["kind"] == "flatten":
                shapes |= focused_shapes(f"{name}.attns.0", dim, heads, block["side"])
        if i < len(stages):
            shapes |= conv_shapes(f"merge{i}.conv", dim, 2 * dim, 3) | norm_shapes(f"merge{i}.norm", 2 * dim)
    return shapes | norm_shapes("norm", dim) | linear_shapes("head", dim, num_classes)


SHAPES = {"swin": swin_shapes, "cswin": cswin_shapes}


def official(name, img_size=96):
    """A small official model: its plan and its random float64 weights."""
    shell, mechanism = name.split("_")
    options = {**model_options(f"{shell}_tiny_{mechanism}"), **SMALL, "window_size": WINDOWS[shell]}
    stages = plan(name, options, img_size)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for key, shape in SHAPES[shell](stages, SMALL["num_classes"]).items():
        is_norm = "norm" in key or "embed.2" in key
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[key] = (1.0 if is_norm and key.endswith("weight") else 0.0) + 0.2 * noise
    return stages, state


# ------------------------------------------------------- the official arithmetic on maps [B, H, W, C], token by token


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def conv(state, name, x, **options):
    return F.conv2d(x.movedim(-1, 1), state[f"{name}.weight"], state[f"{name}.bias"], **options).movedim(1, -1)


def depthwise(state, name, x):
    weight = state[f"{name}.weight"]
    return conv(state, name, x, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def heads_first(x, heads):
    """``[B, ..., C]`` to ``[B, heads, N, d]``, N counting row by row."""
    return x.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_attention(q, k, v, heads, bias=0.0):
    """Maps to a map of the shape of ``v``."""
    q, k, v_heads = (heads_first(x, heads) for x in (q, k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]) + bias
    return (scores.softmax(-1) @ v_heads).transpose(1, 2).reshape(v.shape)


def stripes(state, name, q, k, v, heads, height, width):
    """Softmax attention and LePE, each stripe cut out and treated as an image of its own."""
    out = torch.zeros_like(v)
    for top in range(0, v.shape[1], height):
        for left in range(0, v.shape[2], width):
            cut = (slice(None), slice(top, top + height), slice(left, left + width))
            out[cut] = softmax_attention(q[cut], k[cut], v[cut], heads) + depthwise(state, name, v[cut])
    return out


def windows(state, name, q, k, v, heads, window, shift):
    """Two tokens meet where they share a shifted window and are no more than a window apart in the image."""
    _, height, width, _ = v.shape
    table = state[f"{name}.relative_position_bias_table"]
    rows = torch.arange(height).roll(-shift)
    columns = torch.arange(width).roll(-shift)
    out = torch.zeros_like(v)
    for top in range(0, height, window):
        for left in range(0, width, window):
            cells = torch.cartesian_prod(rows[top : top + window], columns[left : left + window])
            offset = cells[:, None] - cells[None, :]
            near = (offset.abs() < window).all(-1)
            index = (offset + window - 1).clamp(0, 2 * window - 2)
            bias = table[index[..., 0] * (2 * window - 1) + index[..., 1]].permute(2, 0, 1)
            bias = bias.masked_fill(~near, float("-inf"))
            cut = (slice(None), cells[:, 0], cells[:, 1])
            out[cut] = softmax_attention(q[cut], k[cut], v[cut], heads, bias)
    return out


def focused(state, name, q, k, v, heads):
    batch, height, width, dim = v.shape
    k = k + state[f"{name}.positional_encoding"].reshape(1, height, width, dim)
    scale = F.softplus(state[f"{name}.scale"]).reshape(dim)

    def focus(x):
        r = (x.clamp(min=0) + 1e-6) / scale
        return heads_first(r**3 * r.norm(dim=-1, keepdim=True) / (r**3).norm(dim=-1, keepdim=True), heads)

    q, k, values = focus(q), focus(k), heads_first(v, heads)
    weights = torch.einsum("bhid,bhjd->bhij", q, k)
    out = weights @ values / (height * width) / (weights.mean(-1, keepdim=True) + 1e-6)
    out = out.transpose(1, 2).reshape(v.shape)
    local = [depthwise(state, f"{name}.dwc", part) for part in v.chunk(heads, dim=-1)]
    return out + torch.cat(local, dim=-1)


def agent(state, name, q, k, v, heads, agents):
    """The agents are means of the queries; the bias of one pair is bilinear grid plus row term plus column term."""
    _, height, width, _ = v.shape
    n = agents**2
    pooled = F.adaptive_avg_pool2d(q.movedim(-1, 1), agents).movedim(1, -1)

    def grid(key):
        return F.interpolate(state[f"{name}.{key}"], size=(height, width), mode="bilinear")

    gather = grid("an_bias") + (state[f"{name}.ah_bias"] + state[f"{name}.aw_bias"])[0]
    spread = grid("na_bias").permute(0, 2, 3, 1) + (state[f"{name}.ha_bias"] + state[f"{name}.wa_bias"])[0]
    a, q, k, values = (heads_first(x, heads) for x in (pooled, q, k, v))
    scale = q.shape[-1] ** -0.5
    summary = (scale * a @ k.mT + gather.reshape(heads, n, -1)).softmax(-1) @ values
    out = (scale * q @ a.mT + spread.reshape(heads, -1, n)).softmax(-1) @ summary
    return out.transpose(1, 2).reshape(v.shape)


def mlp(state, name, x):
    return x + linear(
        state, f"{name}.mlp.fc2", F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x)))
    )


def swin_block(state, name, block, x):
    q, k, v = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x)).chunk(3, dim=-1)
    attn, heads = f"{name}.attn", block["heads"]
    if block["kind"] == "agent":
        out = agent(state, attn, q, k, v, heads, block["agents"]) + depthwise(state, f"{attn}.dwc", v)
    elif block["kind"] == "flatten":
        out = focused(state, attn, q, k, v, heads)
    else:
        out = windows(state, attn, q, k, v, heads, block["window"], block["shift"])
    return mlp(state, name, x + linear(state, f"{attn}.proj", out))


def cswin_block(state, name, block, x):
    q, k, v = linear(state, f"{name}.qkv", norm(state, f"{name}.norm1", x)).chunk(3, dim=-1)
    attn, heads, side = f"{name}.attns.0", block["heads"], block["side"]
    if block["kind"] == "agent":
        out = agent(state, attn, q, k, v, heads, block["agents"]) + depthwise(state, f"{attn}.get_v", v)
    elif block["kind"] == "flatten":
        out = focused(state, attn, q, k, v, heads) + depthwise(state, f"{attn}.get_v", v)
    elif block["kind"] == "full":
        out = stripes(state, f"{attn}.get_v", q, k, v, heads, side, side)
    else:
        half = [x.chunk(2, dim=-1) for x in (q, k, v)]
        first, second = ([x[i] for x in half] for i in (0, 1))
        upright = stripes(state, f"{attn}.get_v", *first, heads // 2, side, block["window"])
        flat = stripes(state, f"{name}.attns.1.get_v", *second, heads // 2, block["window"], side)
        out = torch.cat([upright, flat], dim=-1)
    return mlp(state, name, x + linear(state, f"{name}.proj", out))


def official_logits(shell, stages, state, image):
    x = image.movedim(1, -1)
    if shell == "swin":
        x = norm(state, "patch_embed.norm", conv(state, "patch_embed.proj", x, stride=4))
    else:
        x = norm(state, "stage1_conv_embed.2", conv(state, "stage1_conv_embed.0", x, stride=4, padding=2))
    for i, stage in enumerate(stages):
        if i and shell == "swin":
            corners = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = norm(state, f"layers.{i - 1}.downsample.norm", torch.cat(corners, dim=-1))
            x = linear(state, f"layers.{i - 1}.downsample.reduction", x)
        elif i:
            x = norm(state, f"merge{i}.norm", conv(state, f"merge{i}.conv", x, stride=2, padding=1))
        for j, block in enumerate(stage):
            if shell == "swin":
                x = swin_block(state, f"layers.{i}.blocks.{j}", block, x)
            else:
                x = cswin_block(state, f"stage{i + 1}.{j}", block, x)
    return linear(state, "head", norm(state, "norm", x).mean(dim=(1, 2)))


# ---------------------------------------------------------------------------------------------- official checkpoints


@pytest.mark.parametrize("name", SOURCES)
def test_official_weights_give_the_official_output(name, tmp_path):
    stages, state = official(name)
    torch.save({"model": state}, tmp_path / "official.pth")
    model = small_model(name)
    report = load_checkpoint(model, tmp_path / "official.pth")
    assert report == LoadReport(SOURCES[name], "raw", len(model.state_dict()), (), ())
    image = torch.randn(2, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = official_logits(name.split("_")[0], stages, state, image), model(image)
    assert expected.std() > 0.1  # a dead network would agree too
    print(f"{name}: largest difference {(found - expected).abs().max():.1e}")
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("size", "img_size"), [("tiny", 224), ("base", 384)])
@pytest.mark.parametrize("name", SOURCES)
def test_published_sizes_convert_with_nothing_left_over(name, img_size, size):
    shell, mechanism = name.split("_")
    full_name = f"{shell}_{size}_{mechanism}"
    with torch.device("meta"):
        model = timm.create_model(full_name, img_size=img_size)
    shapes = SHAPES[shell](plan(name, model_options(full_name, img_size), img_size), 1000)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted, source = convert_state_dict(state, model)
    assert source == SOURCES[name]
    own = model.state_dict()
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in own.items()}


@pytest.mark.parametrize("depths", [(2, 4, 18, 1), (1, 2, 21, 1)])  # the paper's, and the one Microsoft published
def test_full_cswin_tiny_loads_every_tensor(depths, tmp_path):
    stages = plan("cswin_local", model_options("cswin_tiny_local") | {"depths": depths}, 224)
    state = {key: torch.randn(shape) for key, shape in cswin_shapes(stages, 1000).items()}
    torch.save({"state_dict_ema": state}, tmp_path / "cswin.pth")
    model = timm.create_model("cswin_tiny_local", depths=depths)
    report = load_checkpoint(model, tmp_path / "cswin.pth")
    assert (report.source, report.weights, report.matched) == ("microsoft CSWin", "ema", len(state))
    assert torch.equal(model.stages[2].blocks[17].attn.lepe_horizontal.weight, state["stage3.17.attns.1.get_v.weight"])


@pytest.mark.parametrize(
    ("image", "window", "depths", "dim"),
    [
        ((224, 224), 7, (2, 2, 6, 2), 96),
        ((448, 224), 7, (2, 2, 2, 2), 32),  # one window covers one side of the last map only
        ((232, 200), 7, (1, 1, 1, 1), 32),  # nothing divides; timm pads shifted maps otherwise, so none is shifted
        ((384, 384), 12, (1, 2, 2, 1), 32),
    ],
)
def test_timm_swin_gives_timm_logits(image, window, depths, dim, tmp_path):
    heads = (3, 6, 12, 24) if dim == 96 else (2, 4, 8, 16)
    options = {"img_size": image, "window_size": window, "depths": depths, "embed_dim": dim, "num_heads": heads}
    theirs = randomized(timm.create_model("swin_tiny_patch4_window7_224", **options))
    ours = timm.create_model("swin_tiny_local", **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    report = load_checkpoint(ours, tmp_path / "timm.pth")
    assert (report.source, report.matched) == ("timm Swin", len(theirs.state_dict()))
    x = torch.randn(1, 3, *image, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    print(f"timm {image} window {window}: {(found - expected).abs().max():.1e} of {expected.abs().max():.1f}")
    assert (found - expected).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------- containers and files


@pytest.fixture
def nano():
    return timm.create_model("cswin_nano_elfatt", num_classes=5)


def scaled(model, factor):
    return {key: tensor * factor for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_averaged_weights_win_unless_unwanted(nano, tmp_path, averaged, plain):
    raw, ema = scaled(nano, 2), scaled(nano, 3)
    torch.save({plain: raw, averaged: ema, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pth.tar")
    assert load_checkpoint(nano, tmp_path / "a.pth.tar").weights == "ema"
    assert torch.equal(nano.stem.conv.weight, ema["stem.conv.weight"])
    assert load_checkpoint(nano, tmp_path / "a.pth.tar", use_ema=False).weights == "raw"
    assert torch.equal(nano.stem.conv.weight, raw["stem.conv.weight"])


def test_averaged_weights_alone_are_not_taken_for_raw_ones(nano, tmp_path):
    torch.save({"state_dict_ema": nano.state_dict()}, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="averaged weights only: load it with use_ema=True"):
        load_checkpoint(nano, tmp_path / "ema.pth", use_ema=False)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_go(nano, tmp_path, prefix):
    state = scaled(nano, 2)
    torch.save({f"{prefix}{key}": tensor for key, tensor in state.items()}, tmp_path / "wrapped.pt")
    assert load_checkpoint(nano, tmp_path / "wrapped.pt").source == "native"
    assert torch.equal(nano.head.fc.weight, state["head.fc.weight"])


def test_safetensors(nano, tmp_path):
    state = scaled(nano, 2)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    report = load_checkpoint(nano, str(tmp_path / "model.safetensors"))
    assert report == LoadReport("native", "raw", len(state), (), ())
    assert torch.equal(nano.norm.weight, state["norm.weight"])


def test_any_timm_model_under_its_own_names(tmp_path):
    options = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 3}
    source, target = randomized(TimmSwin(**options)), TimmSwin(**options)
    old = source.state_dict() | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    torch.save(old, tmp_path / "swin.pth")
    assert load_checkpoint(target, tmp_path / "swin.pth").source == "native"
    assert torch.equal(target.layers[1].downsample.norm.weight, source.layers[1].downsample.norm.weight)


def test_half_precision_fills_a_float32_model(nano, tmp_path):
    torch.save({key: tensor.half() for key, tensor in nano.state_dict().items()}, tmp_path / "half.pth")
    load_checkpoint(nano, tmp_path / "half.pth")
    assert {parameter.dtype for parameter in nano.parameters()} == {torch.float32}


def test_missing_file(nano, tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_checkpoint(nano, path)


class Surprise:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_not_run(nano, tmp_path, zipped):
    content = {"model": nano.state_dict(), "config": Surprise(tmp_path / "ran")}
    torch.save(content, tmp_path / "unsafe.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"open.*save its tensors alone with torch\.save") as error:
        load_checkpoint(nano, tmp_path / "unsafe.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 1}, [torch.zeros(1)], {"model": [torch.zeros(1)]}])
def test_a_file_without_tensors(nano, tmp_path, content):
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors: it must be a state dict"):
        load_checkpoint(nano, tmp_path / "empty.pth")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04"])
def test_a_damaged_file(nano, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no checkpoint") as error:
        load_checkpoint(nano, tmp_path / name)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------- what does not fit


def save_changed(model, path, *, without=(), **more):
    state = {key: tensor + 1 for key, tensor in model.state_dict().items() if key not in without}
    torch.save({"state_dict": state | more}, path)


@pytest.mark.parametrize(
    ("without", "more", "message"),
    [
        (("norm.bias",), {}, r"1 missing \(norm\.bias\); build the model"),
        ((), {"extra": torch.zeros(1)}, r"1 unexpected \(extra\); build the model"),
        ((), {"norm.bias": torch.zeros(7)}, r"1 mismatched \(norm\.bias \[7\] for \[256\]\); build the model"),
        ((), {"head.fc.bias": torch.zeros(7)}, r"1 mismatched \(head\.fc\.bias \[7\] for \[5\]\); set the .*num_class"),
    ],
)
def test_each_misfit_is_named_and_nothing_is_loaded(nano, tmp_path, without, more, message):
    before = {key: tensor.clone() for key, tensor in nano.state_dict().items()}
    save_changed(nano, tmp_path / "a.pth", without=without, **more)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(nano, tmp_path / "a.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in nano.state_dict().items())


def test_a_checkpoint_of_another_model(nano, tmp_path):
    for other in ("swin_nano_elfatt", "cswin_tiny_global"):
        torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
        with pytest.raises(ValueError, match="native names, raw weights.*does not fit CSWinTransformer") as error:
            load_checkpoint(nano, tmp_path / "other.pth")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 700


def test_an_official_checkpoint_of_another_mechanism(tmp_path):
    torch.save(official("cswin_flatten")[1], tmp_path / "flatten.pth")
    with pytest.raises(ValueError, match=r"FLatten-CSWin names.*missing \(stages\.0\.blocks\.0\.attn\.an_bias"):
        load_checkpoint(small_model("cswin_agent"), tmp_path / "flatten.pth")


def test_two_branches_do_not_pass_for_one(tmp_path):
    state = official("cswin_flatten")[1]
    state |= {key.replace("attns.0", "attns.1"): tensor for key, tensor in state.items() if "stage1.0.attns" in key}
    torch.save(state, tmp_path / "striped.pth")
    with pytest.raises(ValueError, match=r"unexpected \(stages\.0\.blocks\.0\.attn\.lepe_vertical"):
        load_checkpoint(small_model("cswin_flatten"), tmp_path / "striped.pth")


def test_unknown_keys_keep_their_names(nano):
    converted, source = convert_state_dict({"layers.0.downsample.x": torch.ones(1), "ape": torch.ones(1)}, nano)
    assert (source, list(converted)) == ("microsoft Swin", ["stages.1.downsample.x", "ape"])


def test_two_tensors_under_one_name(nano):
    with pytest.raises(ValueError, match="two tensors of the checkpoint are called norm.bias"):
        convert_state_dict({"module.norm.bias": torch.ones(1), "norm.bias": torch.ones(1)}, nano)


def test_allow_skips_a_classifier_of_other_classes(nano, tmp_path, caplog):
    save_changed(timm.create_model("cswin_nano_elfatt", num_classes=7), tmp_path / "seven.pth")
    head = nano.head.fc.weight.clone()
    with caplog.at_level(logging.INFO, logger="elfatt"):
        report = load_checkpoint(nano, tmp_path / "seven.pth", allow=("head.",))
    assert report.skipped == ("head.fc.weight", "head.fc.bias")
    assert report.matched == len(nano.state_dict()) - 2
    assert torch.equal(nano.head.fc.weight, head)
    assert "skipped (head.fc.weight, head.fc.bias)" in caplog.text


def test_allow_covers_a_missing_and_an_unexpected_classifier(nano, tmp_path):
    torch.save(nano.state_dict(), tmp_path / "five.pth")
    headless = timm.create_model("cswin_nano_elfatt", num_classes=0)
    assert load_checkpoint(headless, tmp_path / "five.pth", allow=["head."]).matched == len(headless.state_dict())
    torch.save(headless.state_dict(), tmp_path / "headless.pth")
    assert load_checkpoint(nano, tmp_path / "headless.pth", allow=["head."]).matched == len(headless.state_dict())


def test_allow_is_no_string(nano, tmp_path):
    torch.save(nano.state_dict(), tmp_path / "a.pth")
    with pytest.raises(TypeError, match=r"allow='head\.' must be a sequence"):
        load_checkpoint(nano, tmp_path / "a.pth", allow="head.")


# ------------------------------------------------------------------------------------------- another resolution, log


@pytest.mark.parametrize("name", ["swin_agent", "cswin_agent", "swin_flatten", "cswin_flatten"])
@pytest.mark.parametrize("img_size", [(96, 96), (96, 64), (48, 48)])
def test_resized_tables_give_what_the_old_model_gives_on_the_new_image(name, img_size, tmp_path):
    old = randomized(small_model(name, img_size=64))
    new = small_model(name, img_size=img_size)
    torch.save(old.state_dict(), tmp_path / "old.pth")
    report = load_checkpoint(new, tmp_path / "old.pth")
    tables = ("ah_bias", "aw_bias", "ha_bias", "wa_bias") if "agent" in name else ("positional_encoding",)
    tables = tables[::2] if img_size == (96, 64) else tables  # the width is the old one
    assert set(report.resized) == {key for key in new.state_dict() if key.endswith(tables)}
    image = torch.randn(1, 3, *img_size, dtype=torch.float64)
    with torch.no_grad():
        difference = (old(image) - new(image)).abs().max()
    assert difference < 1e-5  # the tables are resized in float32


@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7)])
def test_relative_position_bias_is_resized_as_microsoft_does(old, new, tmp_path):
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_classes": 2}
    source = timm.create_model("swin_tiny_local", window_size=old, **options)
    target = timm.create_model("swin_tiny_local", window_size=new, **options)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    assert len(load_checkpoint(target, tmp_path / "source.pth").resized) == 4
    table = source.stages[1].blocks[0].attn.relative_position_bias_table.detach()
    expected = resize_rel_pos_bias_table_simple(table, (new, new), ((2 * new - 1) ** 2, 2))
    found = target.stages[1].blocks[0].attn.relative_position_bias_table.detach()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "old", "new", "table"),
    [
        ("swin_flatten", {"img_size": (96, 64)}, {}, "positional_encoding"),  # no way to know its sides
        ("swin_flatten", {"embed_dim": 8}, {}, "positional_encoding"),
        ("cswin_agent", {"agents": 3}, {"agents": 2}, "ah_bias"),
        ("swin_local", {"num_heads": (4, 4, 4, 4)}, {}, "relative_position_bias_table"),
    ],
)
def test_a_table_that_differs_otherwise_is_a_misfit(name, old, new, table, tmp_path):
    torch.save(small_model(name, **old).state_dict(), tmp_path / "old.pth")
    model = small_model(name, **new)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="mismatched"):
        load_checkpoint(model, tmp_path / "old.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    allowed = [key for key in before if not key.endswith(table)]
    with pytest.raises(ValueError, match=rf"fit \w+: \d+ mismatched \([\w.]+{table} \["):
        load_checkpoint(model, tmp_path / "old.pth", allow=allowed)


def test_the_log_line_tells_what_was_done(tmp_path, caplog):
    torch.save({"state_dict_ema": official("swin_agent", img_size=48)[1]}, tmp_path / "agent.pth")
    model = small_model("swin_agent")
    with caplog.at_level(logging.INFO, logger="elfatt.checkpoints"):
        report = load_checkpoint(model, tmp_path / "agent.pth")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    message = record.getMessage()
    assert message.startswith(
        f"{tmp_path / 'agent.pth'}: Agent-Swin names, ema weights, {report.matched} tensors matched, "
        f"{len(report.resized)} resized (stages.0.blocks.0.attn.ah_bias, "
    )
    assert "\n" not in message


def test_the_report_cannot_be_changed():
    with pytest.raises(AttributeError):
        LoadReport("native", "raw", 1, (), ()).matched = 2


def test_a_training_checkpoint_of_a_model_with_the_same_tensors_is_refused(tmp_path):
    """EFFATT and GLOBAL share every name and shape; the file says which of the two it is."""
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_classes": 3}
    source, other = (timm.create_model(name, **options) for name in ("cswin_tiny_effatt", "cswin_tiny_global"))
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": "cswin_tiny_effatt", "state_dict": source.state_dict()}, path)
    load_checkpoint(source, path)
    with pytest.raises(ValueError, match="is a checkpoint of cswin_tiny_effatt, not of cswin_tiny_global"):
        load_checkpoint(other, path)
    load_checkpoint(other, path, allow=("arch",))
