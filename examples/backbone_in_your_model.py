"""Use a backbone in your own model: an ELFATT encoder with a small per-pixel classification head."""

import timm
import torch
import torch.nn.functional as F
from torch import nn

import elfatt  # noqa: F401  registers the models with timm


class Segmenter(nn.Module):
    """Per-pixel classifier that sums the logits of a backbone's four feature maps at stride 4."""

    def __init__(self, name: str, classes: int):
        super().__init__()
        self.backbone = timm.create_model(name, features_only=True)
        channels = self.backbone.feature_info.channels()
        self.heads = nn.ModuleList(nn.Conv2d(width, classes, kernel_size=1) for width in channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = [head(x) for head, x in zip(self.heads, self.backbone(image), strict=True)]
        total = sum(F.interpolate(x, maps[0].shape[-2:], mode="bilinear") for x in maps)
        return F.interpolate(total, image.shape[-2:], mode="bilinear")


model = Segmenter("cswin_nano_elfatt", classes=5)
images, labels = torch.randn(2, 3, 96, 128), torch.randint(5, (2, 96, 128))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
