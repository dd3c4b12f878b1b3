# bash scripts/train_coco.sh configs/detection/mask_rcnn_swin_tiny_agent_1x.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 44.6 box AP, 40.7 mask AP
_base_ = ["_base_/swin_tiny.py", "_base_/coco_1x.py"]

model = dict(backbone=dict(name="swin_tiny_agent", agents=(9, 12, 14, 7), agent_tables=(3, 4, 7, 7)))
