# bash scripts/train_coco.sh configs/detection/mask_rcnn_cswin_tiny_agent_1x.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 46.8 box AP, 42.3 mask AP
_base_ = ["_base_/cswin_tiny.py", "_base_/coco_1x.py"]

model = dict(backbone=dict(name="cswin_tiny_agent"))
