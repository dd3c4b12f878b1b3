"""Official models: names and shapes, from the official files, and their arithmetic, written a second time."""

import math

import timm
import torch
import torch.nn.functional as F

import elfatt  # noqa: F401  registers the models
from elfatt.backbones.zoo import model_options

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


def vmamba_shapes(dims, depths, ratio, num_classes):
    shapes = conv_shapes("patch_embed.0", 3, dims[0] // 2, 3) | norm_shapes("patch_embed.2", dims[0] // 2)
    shapes |= conv_shapes("patch_embed.5", dims[0] // 2, dims[0], 3) | norm_shapes("patch_embed.7", dims[0])
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        inner, rank = int(ratio * dim), math.ceil(dim / 16)
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            shapes |= norm_shapes(f"{name}.norm", dim) | norm_shapes(f"{name}.norm2", dim)
            shapes |= linear_shapes(f"{name}.mlp.fc1", dim, 4 * dim) | linear_shapes(f"{name}.mlp.fc2", 4 * dim, dim)
            shapes |= linear_shapes(f"{name}.op.in_proj", dim, inner, bias=False)
            shapes |= linear_shapes(f"{name}.op.out_proj", inner, dim, bias=False)
            shapes |= norm_shapes(f"{name}.op.out_norm", inner)
            shapes |= {
                f"{name}.op.conv2d.weight": (inner, 1, 3, 3),
                f"{name}.op.x_proj_weight": (4, rank + 2, inner),
                f"{name}.op.dt_projs_weight": (4, inner, rank),
                f"{name}.op.dt_projs_bias": (4, inner),
                f"{name}.op.A_logs": (4 * inner, 1),
                f"{name}.op.Ds": (4 * inner,),
            }
        if i + 1 < len(depths):
            shapes |= conv_shapes(f"layers.{i}.downsample.1", dim, 2 * dim, 3)
            shapes |= norm_shapes(f"layers.{i}.downsample.3", 2 * dim)
    return shapes | norm_shapes("classifier.norm", dims[-1]) | linear_shapes("classifier.head", dims[-1], num_classes)


def convnext_shapes(dims, depths, num_classes):
    shapes = conv_shapes("downsample_layers.0.0", 3, dims[0], 4) | norm_shapes("downsample_layers.0.1", dims[0])
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        if i:
            shapes |= norm_shapes(f"downsample_layers.{i}.0", dims[i - 1])
            shapes |= conv_shapes(f"downsample_layers.{i}.1", dims[i - 1], dim, 2)
        for j in range(depth):
            name = f"stages.{i}.{j}"
            shapes |= {f"{name}.gamma": (dim,)} | conv_shapes(f"{name}.dwconv", 1, dim, 7)
            shapes |= norm_shapes(f"{name}.norm", dim)
            shapes |= linear_shapes(f"{name}.pwconv1", dim, 4 * dim) | linear_shapes(f"{name}.pwconv2", 4 * dim, dim)
    return shapes | norm_shapes("norm", dims[-1]) | linear_shapes("head", dims[-1], num_classes)


SHAPES = {"swin": swin_shapes, "cswin": cswin_shapes}


def official(name, img_size=96):
    """A small official model: its plan and its random float64 weights."""
    shell, mechanism = name.split("_")
    options = {**model_options(f"{shell}_tiny_{mechanism}"), **SMALL, "window_size": WINDOWS[shell]}
    stages = plan(name, options, img_size)
    return stages, drawn(SHAPES[shell](stages, SMALL["num_classes"]))


def drawn(shapes):
    """Random float64 weights, those of norms around one."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for key, shape in shapes.items():
        is_norm = len(shape) == 1 and key.endswith("weight")
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[key] = (1.0 if is_norm else 0.0) + 0.2 * noise
    return state


# ------------------------------------------------------- the official arithmetic on maps [B, H, W, C], token by token


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


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


def official_maps(shell, stages, state, image):
    """What each stage returns, before any norm."""
    x, maps = image.movedim(1, -1), []
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
        maps.append(x)
    return maps


def official_logits(shell, stages, state, image):
    x = official_maps(shell, stages, state, image)[-1]
    return linear(state, "head", norm(state, "norm", x).mean(dim=(1, 2)))


def cross_selective_scan(state, name, x):
    """Of a map with channels first, token by token."""
    batch, inner, height, width = x.shape
    ahead = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], dim=1)
    paths = torch.cat([ahead, ahead.flip(-1)], dim=1)
    rank = state[f"{name}.dt_projs_weight"].shape[-1]
    projected = torch.einsum("bkdl,kcd->bkcl", paths, state[f"{name}.x_proj_weight"])
    low, b, c = projected.split([rank, 1, 1], dim=2)
    step = torch.einsum("bkrl,kdr->bkdl", low, state[f"{name}.dt_projs_weight"])
    step = F.softplus(step + state[f"{name}.dt_projs_bias"][..., None])
    rate = -state[f"{name}.A_logs"].exp().reshape(4, inner)
    skip = state[f"{name}.Ds"].reshape(4, inner)
    h, out = torch.zeros_like(paths[..., 0]), torch.zeros_like(paths)
    for t in range(height * width):
        h = (step[..., t] * rate).exp() * h + step[..., t] * b[..., t] * paths[..., t]
        out[..., t] = c[..., t] * h + skip * paths[..., t]
    out = out[:, :2] + out[:, 2:].flip(-1)
    return out[:, 0].unflatten(-1, (height, width)) + out[:, 1].unflatten(-1, (width, height)).transpose(2, 3)


def vmamba_maps(state, depths, image):
    maps = []
    x = F.gelu(norm(state, "patch_embed.2", conv(state, "patch_embed.0", image.movedim(1, -1), stride=2, padding=1)))
    x = norm(state, "patch_embed.7", conv(state, "patch_embed.5", x, stride=2, padding=1))
    for i, depth in enumerate(depths):
        if i:
            down = f"layers.{i - 1}.downsample"
            x = norm(state, f"{down}.3", conv(state, f"{down}.1", x, stride=2, padding=1))
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            y = linear(state, f"{name}.op.in_proj", norm(state, f"{name}.norm", x)).movedim(-1, 1)
            kernel = state[f"{name}.op.conv2d.weight"]
            y = F.silu(F.conv2d(y, kernel, padding=1, groups=len(kernel)))
            y = norm(state, f"{name}.op.out_norm", cross_selective_scan(state, f"{name}.op", y).movedim(1, -1))
            x = mlp(state, name, x + linear(state, f"{name}.op.out_proj", y))
        maps.append(x)
    return maps


def vmamba_logits(state, depths, image):
    x = vmamba_maps(state, depths, image)[-1]
    return linear(state, "classifier.head", norm(state, "classifier.norm", x).mean(dim=(1, 2)))


def convnext_logits(state, depths, image):
    x = image.movedim(1, -1)
    for i, depth in enumerate(depths):
        down = f"downsample_layers.{i}"
        if i:
            x = conv(state, f"{down}.1", norm(state, f"{down}.0", x, 1e-6), stride=2)
        else:
            x = norm(state, f"{down}.1", conv(state, f"{down}.0", x, stride=4), 1e-6)
        for j in range(depth):
            name = f"stages.{i}.{j}"
            hidden = norm(state, f"{name}.norm", depthwise(state, f"{name}.dwconv", x), 1e-6)
            hidden = linear(state, f"{name}.pwconv2", F.gelu(linear(state, f"{name}.pwconv1", hidden)))
            x = x + state[f"{name}.gamma"] * hidden
    return linear(state, "head", norm(state, "norm", x.mean(dim=(1, 2)), 1e-6))
