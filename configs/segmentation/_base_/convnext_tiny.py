# ConvNeXt-T: channels of its levels, stochastic depth.
# Trains as all systems here, not by ConvNeXt's own recipe (lr 1e-4, weight decay 0.05, lr x 0.9 a stage down).
_base_ = "upernet.py"

model = dict(
    backbone=dict(name="convnext_tiny", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
