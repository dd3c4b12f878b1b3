# Swin-B: stage channels, stochastic depth, ELFATT's blocks.
_base_ = "upernet.py"

model = dict(
    backbone=dict(block_size=14, drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
