# VMamba-T: channels of its levels.
_base_ = "mask_rcnn.py"

model = dict(
    backbone=dict(name="vmamba_tiny"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
