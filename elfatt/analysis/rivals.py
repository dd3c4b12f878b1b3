"""Alternatives from timm with their published accuracy, for ``scaling --rivals``."""

from __future__ import annotations

from elfatt.analysis.paper import load_table

# ImageNet-1K top-1 at 224×224 in percent, trained on ImageNet-1K only, from each model's paper
RIVALS = {
    "swin_tiny_patch4_window7_224": 81.3,  # arXiv 2103.14030
    "convnext_tiny": 82.1,  # 2201.03545
    "efficientvit_b2": 82.1,  # 2205.14756
    "mambaout_tiny": 82.7,  # 2405.07992
    "tiny_vit_21m_224": 83.1,  # 2207.10666
    "caformer_s18": 83.6,  # 2210.13452
}


def published_top1(model: str) -> float | None:
    """Return the published ImageNet-1K top-1 at 224×224 in percent (ELFATT's paper or ``RIVALS``), None if unknown."""
    for row in load_table(1):
        if row["resolution"] == "224" and model == f"{row['backbone']}_{row['attention']}":
            return float(row["top1_percent"])
    return RIVALS.get(model)
