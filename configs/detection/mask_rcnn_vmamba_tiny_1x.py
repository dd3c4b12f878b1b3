# bash scripts/train_coco.sh configs/detection/mask_rcnn_vmamba_tiny_1x.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 47.4 box AP, 42.7 mask AP
_base_ = ["_base_/vmamba_tiny.py", "_base_/coco_1x.py"]
