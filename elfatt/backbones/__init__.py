"""Backbones for every task, and the table that turns them into timm models."""

from elfatt.backbones.cswin import CSWinTransformer
from elfatt.backbones.swin import SwinTransformer
from elfatt.backbones.vmamba import VMamba
from elfatt.backbones.zoo import list_models

__all__ = ["CSWinTransformer", "SwinTransformer", "VMamba", "list_models"]
