# bash scripts/train_coco.sh configs/detection/mask_rcnn_cswin_tiny_elfatt_3xms.py DATA_DIR --pretrained FILE
# hardware: 8 GPUs
# paper: 49.4 box AP, 44.0 mask AP
_base_ = ["_base_/cswin_tiny.py", "_base_/coco_3xms.py"]

model = dict(backbone=dict(name="cswin_tiny_elfatt"))
