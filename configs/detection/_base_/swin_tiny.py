# Swin-T: stage channels, ELFATT's blocks.
_base_ = "mask_rcnn.py"

model = dict(
    backbone=dict(block_size=14),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
