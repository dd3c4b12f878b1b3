"""Backbones and their timm entry points."""

from elfatt.backbones.cswin import CSWinTransformer
from elfatt.backbones.swin import SwinTransformer
from elfatt.backbones.vmamba import VMamba
from elfatt.backbones.zoo import check_model, list_models

__all__ = ["CSWinTransformer", "SwinTransformer", "VMamba", "check_model", "list_models"]
