# bash scripts/train_coco.sh configs/detection/mask_rcnn_convnext_tiny_3xms.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 46.2 box AP, 41.7 mask AP
_base_ = ["_base_/convnext_tiny.py", "_base_/coco_3xms.py"]
