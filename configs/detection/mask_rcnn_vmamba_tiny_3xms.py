# bash scripts/train_coco.sh configs/detection/mask_rcnn_vmamba_tiny_3xms.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 48.9 box AP, 43.7 mask AP
_base_ = ["_base_/vmamba_tiny.py", "_base_/coco_3xms.py"]
