"""ImageNet training (``train.py``) and evaluation (``validate.py``), built on timm."""
