# bash scripts/train_coco.sh configs/detection/mask_rcnn_swin_tiny_global_3xms.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 48.0 box AP, 43.3 mask AP
_base_ = ["_base_/swin_tiny.py", "_base_/coco_3xms.py"]

model = dict(backbone=dict(name="swin_tiny_global"))
