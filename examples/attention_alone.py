"""The attention alone: a drop-in layer for maps ``[B, H, W, C]``, and the operation on tensors."""

import torch

import elfatt
from elfatt.ops import elfatt_attention, use_backend

x = torch.randn(1, 48, 64, 96)
for name in elfatt.list_attentions():
    layer = elfatt.create_attention(name, dim=96, num_heads=4)
    print(f"{name}: {tuple(layer(x).shape)}")

# what ELFATT computes between its two linear layers: 48 channels linear in 2 heads, 48 in blocks of 7 × 7 in 2 heads
qkv = torch.randn(1, 48, 64, 3 * 96)
with use_backend("math"):
    expected = elfatt_attention(qkv, num_heads=(2, 2), global_channels=48, block_size=7)
found = elfatt_attention(qkv, num_heads=(2, 2), global_channels=48, block_size=7)
print(f"the fastest backend differs from explicit products by {(found - expected).abs().max():.1e}")
