# ConvNeXt-T: stage channels, stochastic depth.
# Trained like all systems here, not with ConvNeXt's own recipe (lr 1e-4, weight decay 0.05, stage-wise lr decay 0.9).
_base_ = "upernet.py"

model = dict(
    backbone=dict(name="convnext_tiny", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
