"""Standalone attention: a drop-in layer for maps ``[B, H, W, C]``, and the functional op on tensors."""

import torch

import elfatt
from elfatt.ops import elfatt_attention, use_backend

x = torch.randn(1, 48, 64, 96)
for name in elfatt.list_attentions():
    layer = elfatt.create_attention(name, dim=96, num_heads=4)
    print(f"{name}: {tuple(layer(x).shape)}")

# ELFATT between its two projections: 48 channels with 2 linear heads, 48 with 2 heads in 7 × 7 blocks
qkv = torch.randn(1, 48, 64, 3 * 96)
with use_backend("math"):
    expected = elfatt_attention(qkv, num_heads=(2, 2), global_channels=48, block_size=7)
found = elfatt_attention(qkv, num_heads=(2, 2), global_channels=48, block_size=7)
print(f"the fastest backend differs from explicit products by {(found - expected).abs().max():.1e}")
