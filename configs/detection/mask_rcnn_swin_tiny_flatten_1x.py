# bash scripts/train_coco.sh configs/detection/mask_rcnn_swin_tiny_flatten_1x.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 44.2 box AP, 40.2 mask AP
_base_ = ["_base_/swin_tiny.py", "_base_/coco_1x.py"]

model = dict(backbone=dict(name="swin_tiny_flatten"))
