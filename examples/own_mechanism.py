"""Register your own attention mechanism, for use in every backbone."""

import timm
import torch

from elfatt.attention.base import QKVAttention
from elfatt.attention.registry import register_attention


@register_attention("mean")
class MeanAttention(QKVAttention):
    """Return the mean of the values for every token, gated by its query."""

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        q, _, v = qkv.chunk(3, dim=-1)
        return q.sigmoid() * v.mean((1, 2), keepdim=True)


model = timm.create_model("swin_nano_elfatt", attention="mean", num_classes=10)
logits = model(torch.randn(2, 3, 96, 96))
logits.sum().backward()
count = sum(isinstance(module, MeanAttention) for module in model.modules())
print(f"{count} layers of MeanAttention, logits {tuple(logits.shape)}")
