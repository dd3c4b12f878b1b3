"""The ELFATT operation as a function of tensors: gradients by finite differences, errors for bad shapes."""

import pytest
import torch

from elfatt import ops


def arguments(channels=8, split=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    kernels = [
        (torch.randn(c, 1, 3, 3, generator=generator, dtype=dtype), torch.randn(c, generator=generator, dtype=dtype))
        for c in (split, channels - split)
    ]
    qkv = torch.randn(1, 3, 5, 3 * channels, generator=generator, dtype=dtype)
    return qkv, {
        "num_heads": (1, 2),
        "global_channels": split,
        "block_size": 2,
        "lepe_global": kernels[0],
        "lepe_local": kernels[1],
    }


@pytest.mark.parametrize("backend", ["reference", "math", "auto"])
def test_gradients_by_finite_differences(backend):
    qkv, options = arguments()
    leaves = [qkv, *options["lepe_global"], *options["lepe_local"]]

    def op(qkv, wg, bg, wl, bl):
        return ops.elfatt_attention(qkv, **{**options, "lepe_global": (wg, bg), "lepe_local": (wl, bl)})

    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in leaves])


def test_strided_input_is_taken_as_it_is():
    qkv, options = arguments()
    wide = torch.randn(1, 3, 5, 48, dtype=torch.float64)
    wide[..., ::2] = qkv
    torch.testing.assert_close(ops.elfatt_attention(wide[..., ::2], **options), ops.elfatt_attention(qkv, **options))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"global_channels": 9}, "global_channels=9 must lie between 0 and C=8"),
        ({"num_heads": (3, 2)}, "4 global channels cannot be split into 3 heads"),
        ({"num_heads": (1, 3)}, "4 local channels cannot be split into 3 heads"),
    ],
)
def test_bad_values_are_named(change, words):
    qkv, options = arguments()
    with pytest.raises(ValueError, match=words):
        ops.elfatt_attention(qkv, **{**options, **change})


@pytest.mark.parametrize("shape", [(1, 0, 5, 24), (1, 3, 0, 24)])
def test_a_map_without_tokens_is_named(shape):
    _, options = arguments()
    with pytest.raises(ValueError, match="the map has no tokens"):
        ops.elfatt_attention(torch.zeros(shape), **options)


def test_unpacked_qkv_is_named():
    _, options = arguments()
    with pytest.raises(ValueError, match=r"qkv must be \[B, H, W, 3C\], got \(1, 3, 5, 8\)"):
        ops.elfatt_attention(torch.zeros(1, 3, 5, 8), **options)


def test_float16_on_autocast_keeps_the_dtype():
    qkv, options = arguments(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.elfatt_attention(qkv.bfloat16(), **options).dtype == torch.bfloat16
