# bash scripts/train_ade20k.sh configs/segmentation/upernet_cswin_base_elfatt.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: not reported
_base_ = ["_base_/cswin_base.py", "_base_/ade20k_160k.py"]

model = dict(backbone=dict(name="cswin_base_elfatt"))
