# VMamba-T: stage channels, stochastic depth.
# As in MzeroMiko/VMamba, segmentation/configs, weight decay skips norms, not the scans' A_logs, Ds and dt_projs_bias.
_base_ = "upernet.py"

model = dict(
    backbone=dict(name="vmamba_tiny", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
