"""ImageNet training (`train.py`) and evaluation (`validate.py`), wired from timm's parts."""
