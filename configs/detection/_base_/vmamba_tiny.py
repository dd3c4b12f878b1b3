# VMamba-T: stage channels.
# As in MzeroMiko/VMamba, detection/configs, weight decay skips norms, not the scans' A_logs, Ds and dt_projs_bias.
_base_ = "mask_rcnn.py"

model = dict(
    backbone=dict(name="vmamba_tiny"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
