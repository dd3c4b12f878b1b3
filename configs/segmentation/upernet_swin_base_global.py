# bash scripts/train_ade20k.sh configs/segmentation/upernet_swin_base_global.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: not reported
_base_ = ["_base_/swin_base.py", "_base_/ade20k_160k.py"]

model = dict(backbone=dict(name="swin_base_global"))
