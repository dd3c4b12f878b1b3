# bash scripts/train_ade20k.sh configs/segmentation/upernet_convnext_tiny.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 46.1 % mIoU, 58.3 % mAcc
_base_ = ["_base_/convnext_tiny.py", "_base_/ade20k_160k.py"]
