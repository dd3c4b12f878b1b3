# bash scripts/train_coco.sh configs/detection/mask_rcnn_swin_tiny_agent_3xms.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 47.3 box AP, 42.7 mask AP
_base_ = ["_base_/swin_tiny.py", "_base_/coco_3xms.py"]

model = dict(backbone=dict(name="swin_tiny_agent", agents=(9, 12, 14, 7), agent_tables=(3, 4, 7, 7)))
