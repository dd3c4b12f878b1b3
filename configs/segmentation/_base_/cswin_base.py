# CSWin-B: stage channels, stochastic depth, ELFATT's blocks.
_base_ = "upernet.py"

model = dict(
    backbone=dict(block_size=14, drop_path_rate=0.6),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
