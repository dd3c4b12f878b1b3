# CSWin-T: stage channels, stochastic depth, ELFATT's blocks.
_base_ = "upernet.py"

model = dict(
    backbone=dict(block_size=14, drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
