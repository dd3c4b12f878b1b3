# bash scripts/train_ade20k.sh configs/segmentation/upernet_cswin_tiny_local.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 49.6 % mIoU, 61.1 % mAcc
_base_ = ["_base_/cswin_tiny.py", "_base_/ade20k_160k.py"]

model = dict(backbone=dict(name="cswin_tiny_local"))
