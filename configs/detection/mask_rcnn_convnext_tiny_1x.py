# bash scripts/train_coco.sh configs/detection/mask_rcnn_convnext_tiny_1x.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 44.2 box AP, 40.1 mask AP
_base_ = ["_base_/convnext_tiny.py", "_base_/coco_1x.py"]
