"""Every mechanism once more, as its formula reads, in loops over images, heads and blocks; and ELFATT's backbone.

Nothing here calls the package: a function takes a mechanism's weights by name and a map ``x[B, H, W, C]`` in float64.
"""

import torch


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def convolve(w, name, x):
    """Depthwise convolution of a map [H, W, C] by its definition: a sum over shifted copies of a zero-padded map."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    reach = weight.shape[-1] // 2
    height, width, channels = x.shape
    canvas = x.new_zeros(height + 2 * reach, width + 2 * reach, channels)
    canvas[reach : reach + height, reach : reach + width] = x
    out = bias.expand_as(x).clone()
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            out = out + weight[:, 0, dy, dx] * canvas[dy : dy + height, dx : dx + width]
    return out


def softmax(scores, dim):
    weights = (scores - scores.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def softmax_heads(q, k, v, heads, bias=None):
    """Softmax attention of tokens [N, C] head by head; ``bias[heads, N, M]``."""
    out = []
    for h, (a, b, c) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)):
        scores = a @ b.T / a.shape[-1] ** 0.5
        out.append(softmax(scores if bias is None else scores + bias[h], -1) @ c)
    return torch.cat(out, -1)


def efficient_heads(q, k, v, heads):
    out = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        out.append(softmax(a, -1) @ (softmax(b, 0).T @ c))
    return torch.cat(out, -1)


def in_blocks(q, k, v, heads, block, w, lepe):
    """Softmax attention and LePE in blocks of a map [H, W, C], zero-padded to whole blocks."""
    height, width, channels = q.shape
    bh, bw = min(block[0], height), min(block[1], width)
    rows, columns = -(-height // bh), -(-width // bw)
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, columns * bw - width, 0, rows * bh - height)) for t in (q, k, v))
    out = torch.zeros_like(q)
    for r in range(rows):
        for c in range(columns):
            here = slice(r * bh, (r + 1) * bh), slice(c * bw, (c + 1) * bw)
            tokens = [t[here].reshape(bh * bw, channels) for t in (q, k, v)]
            one = softmax_heads(*tokens, heads).reshape(bh, bw, channels)
            out[here] = one + (convolve(w, lepe, v[here]) if f"{lepe}.weight" in w else 0)
    return out[:height, :width]


def per_image(fn):
    return lambda w, x, **options: torch.stack([fn(w, image, **options) for image in x])


@per_image
def vanilla(w, x, *, num_heads):
    q, k, v = linear(w, "qkv", x).chunk(3, -1)
    return linear(w, "proj", in_blocks(q, k, v, num_heads, x.shape[:2], w, "lepe"))


@per_image
def effatt(w, x, *, num_heads):
    q, k, v = linear(w, "qkv", x).chunk(3, -1)
    out = efficient_heads(*(t.flatten(0, 1) for t in (q, k, v)), num_heads).view(x.shape)
    return linear(w, "proj", out + (convolve(w, "lepe", v) if "lepe.weight" in w else 0))


@per_image
def elfatt(w, x, *, num_heads, block_size, channel_split=0.5):
    q, k, v = linear(w, "qkv", x).chunk(3, -1)
    c1 = round(x.shape[-1] * channel_split)
    heads = num_heads if channel_split in (0, 1) else max(1, num_heads // 2)
    parts = []
    if c1:
        qkv_global = [t[..., :c1] for t in (q, k, v)]
        out = efficient_heads(*(t.flatten(0, 1) for t in qkv_global), heads).view(qkv_global[2].shape)
        parts.append(out + (convolve(w, "lepe_global", qkv_global[2]) if "lepe_global.weight" in w else 0))
    if c1 < x.shape[-1]:
        qkv_local = [t[..., c1:] for t in (q, k, v)]
        parts.append(in_blocks(*qkv_local, heads, (block_size, block_size), w, "lepe_local"))
    return linear(w, "proj", torch.cat(parts, -1))


@per_image
def cswin(w, x, *, num_heads, stripe):
    """Each half of the channels on a canvas of whole stripes, the map in its middle; an odd token lies behind it."""
    qkv, out = linear(w, "qkv", x).chunk(3, -1), []
    for part, name in enumerate(("lepe_vertical", "lepe_horizontal")):
        size, places = [*x.shape[:2]], [slice(0, x.shape[0]), slice(0, x.shape[1])]
        axis = 1 - part
        size[axis] = stripe * -(-x.shape[axis] // stripe)
        start = (size[axis] - x.shape[axis]) // 2
        places[axis] = slice(start, start + x.shape[axis])
        canvases = [t.new_zeros(*size, x.shape[-1] // 2) for t in qkv]
        for canvas, t in zip(canvases, qkv, strict=True):
            canvas[tuple(places)] = t.chunk(2, -1)[part]
        block = (size[0], stripe) if axis else (stripe, size[1])
        out.append(in_blocks(*canvases, num_heads // 2, block, w, name)[tuple(places)])
    return linear(w, "proj", torch.cat(out, -1))


@per_image
def swin(w, x, *, num_heads, window_size, shifted=False):
    height, width, channels = x.shape
    s = window_size
    x = torch.nn.functional.pad(x, (0, 0, 0, -width % s, 0, -height % s))
    padded = x.shape[:2]
    shift = [s // 2 if shifted and side > s else 0 for side in padded]
    qkv = linear(w, "qkv", x)
    out = torch.zeros_like(x)
    table = w["relative_position_bias_table"]
    for top in range(0, padded[0], s):
        for left in range(0, padded[1], s):
            # a token of the shifted map sits at (y, x) of the true one; regions that the wrap separates stay apart
            places = [(top + i, left + j) for i in range(s) for j in range(s)]
            true = [((y + shift[0]) % padded[0], (u + shift[1]) % padded[1]) for y, u in places]
            wrapped = [(y + shift[0] >= padded[0], u + shift[1] >= padded[1]) for y, u in places]
            q, k, v = torch.stack([qkv[p] for p in true]).chunk(3, -1)
            bias = torch.zeros(num_heads, s * s, s * s, dtype=x.dtype)
            for a, (ya, xa) in enumerate(places):
                for b, (yb, xb) in enumerate(places):
                    row = (ya - yb + s - 1) * (2 * s - 1) + (xa - xb + s - 1)
                    bias[:, a, b] = table[row] - (100.0 if wrapped[a] != wrapped[b] else 0.0)
            result = softmax_heads(q, k, v, num_heads, bias)
            for p, token in zip(true, result, strict=True):
                out[p] = token
    return linear(w, "proj", out[:height, :width])


def bilinear(table, size):
    """Bilinear resize of ``table[h, w]`` with half-pixel centres, by its definition."""
    out = torch.zeros(size, dtype=table.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            corners = []
            for place, old, new in ((i, table.shape[0], size[0]), (j, table.shape[1], size[1])):
                at = max((place + 0.5) * old / new - 0.5, 0)
                low = min(int(at), old - 1)
                corners.append((low, min(low + 1, old - 1), at - low))
            (y0, y1, fy), (x0, x1, fx) = corners
            top = table[y0, x0] * (1 - fx) + table[y0, x1] * fx
            bottom = table[y1, x0] * (1 - fx) + table[y1, x1] * fx
            out[i, j] = top * (1 - fy) + bottom * fy
    return out


@per_image
def agent(w, x, *, num_heads, agents, feat_size):
    height, width, channels = x.shape
    q, k, v = linear(w, "qkv", x).chunk(3, -1)
    pooled = []
    for i in range(agents):
        for j in range(agents):
            rows = slice(i * height // agents, -(-(i + 1) * height // agents))
            columns = slice(j * width // agents, -(-(j + 1) * width // agents))
            pooled.append(q[rows, columns].mean((0, 1)))
    a = torch.stack(pooled)
    n = agents**2
    gather = torch.zeros(num_heads, n, height * width, dtype=x.dtype)
    broadcast = torch.zeros(num_heads, height * width, n, dtype=x.dtype)
    for h in range(num_heads):
        for g in range(n):
            row = bilinear(w["ah_bias"][h, g], (height, 1))
            column = bilinear(w["aw_bias"][h, g], (1, width))
            gather[h, g] = (bilinear(w["an_bias"][h, g], (height, width)) + row + column).flatten()
            row = bilinear(w["ha_bias"][h, :, :, g], (height, 1))
            column = bilinear(w["wa_bias"][h, :, :, g], (1, width))
            broadcast[h, :, g] = (bilinear(w["na_bias"][h, g], (height, width)) + row + column).flatten()
    q, k, values = (t.flatten(0, 1) for t in (q, k, v))
    gathered = softmax_heads(a, k, values, num_heads, gather)
    out = softmax_heads(q, a, gathered, num_heads, broadcast).view(x.shape)
    return linear(w, "proj", out + convolve(w, "lepe", v))


@per_image
def flatten(w, x, *, num_heads, feat_size):
    q, k, v = linear(w, "qkv", x).chunk(3, -1)
    assert tuple(feat_size) == tuple(x.shape[:2]), "the resized table is tested apart"
    q, k, values = (t.flatten(0, 1) for t in (q, k, v))
    k = k + w["positional_encoding"][0]

    def focus(t):
        r = (t.clamp(min=0) + 1e-6) / torch.log1p(w["scale"][0].exp())
        return r**3 * ((r**2).sum(-1, keepdim=True) / (r**6).sum(-1, keepdim=True)).sqrt()

    heads = []
    for a, b, c in zip(*(t.chunk(num_heads, -1) for t in (focus(q), focus(k), values)), strict=True):
        heads.append(a @ (b.T @ c / len(b)) / (a @ b.mean(0)[:, None] + 1e-6))
    out = torch.cat(heads, -1).view(x.shape)
    out = out + torch.cat([convolve(w, "dwc", head) for head in v.chunk(num_heads, -1)], -1)
    return linear(w, "proj", out + (convolve(w, "lepe", v) if "lepe.weight" in w else 0))


def normalize(w, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def shrink(w, name, x, stride, padding):
    """Convolution of a zero-padded map [H, W, C] by its definition: a sum over the places of the kernel."""
    weight, (height, width, _) = w[f"{name}.weight"], x.shape
    side = weight.shape[-1]
    x = torch.nn.functional.pad(x, (0, 0, padding, padding, padding, padding))
    rows, columns = ((length + 2 * padding - side) // stride + 1 for length in (height, width))
    out = w[f"{name}.bias"].expand(rows, columns, -1)
    for dy in range(side):
        for dx in range(side):
            places = x[dy : dy + stride * rows : stride, dx : dx + stride * columns : stride][:rows, :columns]
            out = out + places @ weight[:, :, dy, dx].T
    return out


def elfatt_maps(w, image, *, levels, num_heads, block_size):
    """The map [H, W, C] of each level for an image [3, H, W]; ``levels`` has a letter for each block, E or V."""
    x, maps = normalize(w, "stem.norm", shrink(w, "stem.conv", image.permute(1, 2, 0), 4, 2)), []
    for i, (letters, heads, side) in enumerate(zip(levels, num_heads, block_size, strict=True)):
        if i:
            merge = f"stages.{i}.downsample"
            x = normalize(w, f"{merge}.norm", shrink(w, f"{merge}.conv", x, 2, 1))
        for j, letter in enumerate(letters):
            block = f"stages.{i}.blocks.{j}."
            own = {key.removeprefix(block): value for key, value in w.items() if key.startswith(block)}
            weights = {key.removeprefix("attn."): value for key, value in own.items()}
            tokens = normalize(own, "norm1", x)[None]
            if letter == "E":
                x = x + elfatt(weights, tokens, num_heads=heads, block_size=side)[0]
            else:
                x = x + vanilla(weights, tokens, num_heads=heads)[0]
            x = x + linear(own, "mlp.fc2", gelu(linear(own, "mlp.fc1", normalize(own, "norm2", x))))
        maps.append(x)
    return maps


def ss2d(w, name, x):
    """VMamba's scan of a map [H, W, C]: four walks over its cells, one recurrence each, with one state a channel."""
    height, width, _ = x.shape
    x = x @ w[f"{name}.in_proj.weight"].T
    kernel = {"dw.weight": w[f"{name}.conv2d.weight"], "dw.bias": x.new_zeros(x.shape[-1])}
    x = convolve(kernel, "dw", x)
    x = x * x.sigmoid()
    by_row = [(r, c) for r in range(height) for c in range(width)]
    by_column = [(r, c) for c in range(width) for r in range(height)]
    rank, inner = w[f"{name}.dt_projs_weight"].shape[-1], x.shape[-1]
    out = torch.zeros_like(x)
    for k, walk in enumerate((by_row, by_column, by_row[::-1], by_column[::-1])):
        part = slice(k * inner, (k + 1) * inner)
        rate, skip = -w[f"{name}.A_logs"][part, 0].exp(), w[f"{name}.Ds"][part]
        state = x.new_zeros(inner)
        for cell in walk:
            low = w[f"{name}.x_proj_weight"][k] @ x[cell]
            step = w[f"{name}.dt_projs_weight"][k] @ low[:rank] + w[f"{name}.dt_projs_bias"][k]
            step = (1 + step.exp()).log()
            state = (step * rate).exp() * state + step * low[rank] * x[cell]
            out[cell] += low[rank + 1] * state + skip * x[cell]
    return normalize(w, f"{name}.out_norm", out) @ w[f"{name}.out_proj.weight"].T


def vmamba_logits(w, image, depths):
    """VMamba from its weights, under the package's names, and an image [3, H, W]."""
    x = gelu(normalize(w, "stem.norm1", shrink(w, "stem.conv1", image.permute(1, 2, 0), 2, 1)))
    x = normalize(w, "stem.norm2", shrink(w, "stem.conv2", x, 2, 1))
    for i, depth in enumerate(depths):
        if i:
            x = normalize(w, f"stages.{i}.downsample.norm", shrink(w, f"stages.{i}.downsample.conv", x, 2, 1))
        for j in range(depth):
            name = f"stages.{i}.blocks.{j}"
            x = x + ss2d(w, f"{name}.attn", normalize(w, f"{name}.norm1", x))
            hidden = gelu(linear(w, f"{name}.mlp.fc1", normalize(w, f"{name}.norm2", x)))
            x = x + linear(w, f"{name}.mlp.fc2", hidden)
    return linear(w, "head.fc", normalize(w, "norm", x).mean((0, 1)))
