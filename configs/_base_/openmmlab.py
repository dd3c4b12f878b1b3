# Shared by segmentation and detection: backbone registration, optimizer, logs and checkpoints.
custom_imports = dict(imports=["elfatt.integrations.openmmlab"])

_no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AmpOptimWrapper",  # the paper trains in mixed precision; --no-amp for float32
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999)),
    paramwise_cfg=dict(
        custom_keys={
            "relative_position_bias_table": _no_decay,
            "norm": _no_decay,
            # Agent's position biases, as in its configs (LeapLabTHU/Agent-Attention, downstream/*/configs/agent_swin)
            **{f"{table}_bias": _no_decay for table in ("an", "na", "ah", "aw", "ha", "wa")},
            # norms of timm's ConvNeXt without "norm" in the name
            "features.model.stem.1.": _no_decay,
            "downsample.0.": _no_decay,
        }
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2 images

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
log_level = "INFO"
load_from = None
resume = False
