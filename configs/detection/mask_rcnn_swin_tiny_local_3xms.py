# bash scripts/train_coco.sh configs/detection/mask_rcnn_swin_tiny_local_3xms.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 46.0 box AP, 41.6 mask AP
_base_ = ["_base_/swin_tiny.py", "_base_/coco_3xms.py"]

model = dict(backbone=dict(name="swin_tiny_local"))
