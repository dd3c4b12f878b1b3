# bash scripts/train_ade20k.sh configs/segmentation/upernet_vmamba_tiny.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 47.9 % mIoU, 59.3 % mAcc
_base_ = ["_base_/vmamba_tiny.py", "_base_/ade20k_160k.py"]
