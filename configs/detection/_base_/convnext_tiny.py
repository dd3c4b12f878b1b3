# ConvNeXt-T: stage channels.
# Trained like all systems here, not with ConvNeXt's own recipe (drop path 0.4, layer-wise lr decay 0.95).
_base_ = "mask_rcnn.py"

model = dict(
    backbone=dict(name="convnext_tiny"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
