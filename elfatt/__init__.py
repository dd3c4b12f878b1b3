"""ELFATT: efficient linear fast attention for vision transformers (arXiv 2501.06098).

Importing the package registers its models with timm: ``timm.create_model("cswin_tiny_elfatt")``.
"""

from elfatt import checkpoints, ops
from elfatt.attention import create_attention, list_attentions
from elfatt.backbones import list_models
from elfatt.integrations.timm import convert

__version__ = "0.2.0"
__all__ = ["checkpoints", "convert", "create_attention", "list_attentions", "list_models", "ops"]
