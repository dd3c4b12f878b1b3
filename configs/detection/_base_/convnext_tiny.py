# ConvNeXt-T: channels of its levels.
# Trains as all systems here, not by ConvNeXt's own recipe (drop path 0.4, lr x 0.95 a layer down).
_base_ = "mask_rcnn.py"

model = dict(
    backbone=dict(name="convnext_tiny"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
