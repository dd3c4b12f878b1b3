# bash scripts/train_coco.sh configs/detection/mask_rcnn_swin_tiny_effatt_1x.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 44.7 box AP, 41.1 mask AP
_base_ = ["_base_/swin_tiny.py", "_base_/coco_1x.py"]

model = dict(backbone=dict(name="swin_tiny_effatt"))
