# bash scripts/quickstart.sh
# hardware: two CPU cores
# expected: 78 % mIoU over background and ten digits on 100 held-out scenes (goal: 75 %)
_base_ = ["_base_/cswin_tiny.py", "_base_/ade20k_160k.py"]

data_root = "runs/quickstart/data/scenes"  # --data-dir
num_classes = 11
metainfo = dict(classes=("background", *"zero one two three four five six seven eight nine".split()))

_head = dict(num_classes=num_classes, norm_cfg=None, dropout_ratio=0)  # batch norm learns slowly from few images
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(name="cswin_nano_elfatt", block_size=4, drop_path_rate=0.0),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=32, **_head),
    auxiliary_head=dict(in_channels=128, channels=32, **_head),
)
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadAnnotations"),
    dict(type="CheckMask", num_classes=num_classes),
    dict(type="PhotoMetricDistortion"),  # no flips: digits are not mirror-invariant
    dict(type="PackSegInputs"),
]
test_pipeline = [*train_pipeline[:3], dict(type="PackSegInputs")]
tta_pipeline = None  # no flips either
_dataset = dict(type="BaseSegDataset", data_root=data_root, metainfo=metainfo)
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(**_dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(**_dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=100, end=1500),
]
train_cfg = dict(max_iters=1500, val_interval=750)
default_hooks = dict(checkpoint=dict(interval=500, max_keep_ckpts=1, save_best=None))
