"""Rows of the paper's tables: names, models and measurement settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isqrt
from pathlib import Path

import timm
import torch
from torch import nn

import elfatt  # noqa: F401  registers the models
from elfatt.analysis.complexity import Complexity, measure_complexity
from elfatt.analysis.paper import load_table
from elfatt.suggest import closest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DENSE_SIZES = {6: (800, 1280), 7: (512, 2048)}  # height and width in pixels, for counts and speeds
OTHERS = {"ConvNeXt-T": "convnext_tiny", "EfficientViT-B2": "efficientvit_b2", "VMamba-T": "vmamba_tiny"}
TITLES = {
    1: "ImageNet-1K",
    2: "Block size",
    3: "LePE",
    4: "Attention of the levels",
    5: "Channel split",
    6: "Mask R-CNN on COCO",
    7: "UperNet on ADE20K",
    8: "Jetson AGX Orin",
    9: "Jetson Nano",
}


@dataclass(frozen=True)
class Row:
    """A row of a published table.

    Attributes:
        table: 1 to 9.
        published: Cells as printed; empty for a dash in the paper.
    """

    table: int
    published: dict[str, str]

    @property
    def model(self) -> str:
        """The paper's name of the model, or the changed setting of an ablation."""
        cells = self.published
        if self.table == 2:
            return "blocks " + "-".join(cells[f"tokens_per_block_level{i}"] for i in (1, 2, 3, 4))
        if self.table == 4:
            return "levels " + cells["levels_1_to_4"].replace(" ", "-")
        if self.table == 5:
            return "c1/c = " + cells["c1_over_c"]
        return cells["model"]

    @property
    def name(self) -> str:
        """Model name with resolution and schedule, unique within the table."""
        return " ".join(filter(None, (self.model, self.published.get("resolution"), self.published.get("schedule"))))

    @property
    def group(self) -> str:
        """Comparison group: shell, size, resolution and schedule; other systems are grouped as in the paper."""
        shell = self.published.get("backbone", "cswin_tiny")
        shell = shell if "win_" in shell else "cswin_tiny" if self.is_edge else "swin_tiny"
        return " ".join(filter(None, (shell, self.published.get("resolution"), self.published.get("schedule"))))

    @property
    def is_vanilla(self) -> bool:
        """Whether all of its attention is vanilla."""
        return self.model.endswith("-GLOBAL") or self.model == "levels V-V-V-V"

    @property
    def is_edge(self) -> bool:
        """Whether the table is of an edge device, with speeds only."""
        return self.table in (8, 9)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        side = int(self.published.get("resolution") or 224)
        return DENSE_SIZES.get(self.table, (side, side))

    @property
    def batch_size(self) -> int:
        """Batch size of the paper's speed measurements."""
        if self.table in (6, 7, 9):
            return 1
        if self.table == 8:
            return 128
        if "-B" not in self.model:
            return 512
        return 256 if self.img_size[0] == 224 else 32

    @property
    def config(self) -> str:
        """Stem of its config file and of its checkpoint."""
        if self.is_ablation:
            return self.variant
        name, _ = self.timm_model()
        if self.table == 6:
            return f"mask_rcnn_{name}_{self.published['schedule'].lower()}"
        return f"upernet_{name}" if self.table == 7 else f"{name}_{self.img_size[0]}"

    @property
    def is_ablation(self) -> bool:
        """Whether it is in ``configs/classification/ablations.yaml``."""
        return 2 <= self.table <= 5

    @property
    def variant(self) -> str:
        """Variant of an ablation in that file, such as ``table4_E-E-H-V``."""
        what = self.model.split()[-1]
        if self.table == 3:
            what = what.split("-")[2].lower() + ("_no_lepe" if "w/o" in what else "")
        return f"table{self.table}_{what}"

    def config_arguments(self) -> list[str]:
        """Return the arguments of the classification programs for this model."""
        if self.is_ablation:
            return ["--config", str(CONFIGS / "classification" / "ablations.yaml"), "--variant", self.variant]
        return ["--config", str(CONFIGS / "classification" / f"{self.config}.yaml")]

    def fits(self, pattern: str) -> bool:
        """Whether a case-insensitive glob pattern matches its name, model or config."""
        return any(fnmatchcase(name.lower(), pattern.lower()) for name in (self.name, self.model, self.config))

    def build(self, device: str = "meta") -> nn.Module:
        """Build the model in eval mode, with random weights.

        Raises:
            FileNotFoundError: A dense model outside a checkout, without its config.
            ImportError: A dense model without mmsegmentation or mmdetection.
        """
        if self.table in DENSE_SIZES:
            return self._build_dense(device)
        name, options = self.timm_model()
        with torch.device(device):
            return timm.create_model(name, **options).eval()

    def count(self) -> Complexity:
        """Count parameters and multiply-adds by the paper's rules, on the meta device; raises like ``build``.

        VMamba-T's selective scan is not counted in Table I, but is in Tables VI and VII.
        """
        found = measure_complexity(self.build(), self.img_size)
        scanned = self.model == "VMamba-T" and self.table in DENSE_SIZES
        return replace(found, macs_nfa=found.macs_true, macs_fa=found.macs_true) if scanned else found

    def timm_model(self) -> tuple[str, dict]:
        """Return the timm name and keyword arguments of the classification model, or of a dense model's backbone.

        Tables II to V vary CSWin-T-ELFATT, with 14×14 blocks unless the row says otherwise.
        """
        cells = self.published
        base = {"block_size": 14}
        if self.table == 2:
            sides = [isqrt(int(cells[f"tokens_per_block_level{i}"])) for i in (1, 2, 3, 4)]
            return "cswin_tiny_elfatt", {"block_size": sides}
        if self.table == 3:
            name = "cswin_tiny_global" if "GLOBAL" in self.model else "cswin_tiny_elfatt"
            return name, {**base, "lepe": cells["lepe"] == "yes"}
        if self.table == 4:
            return "cswin_tiny_elfatt", {**base, "levels": cells["levels_1_to_4"].split()}
        if self.table == 5:
            share = float(cells["c1_over_c"])
            return ("cswin_tiny_effatt", {}) if share == 1 else ("cswin_tiny_elfatt", {**base, "channel_split": share})
        if not cells["attention"]:
            return OTHERS[cells["backbone"]], {}
        options = {} if self.table in DENSE_SIZES else {"img_size": self.img_size[0]}
        return f"{cells['backbone']}_{cells['attention']}", options

    def _build_dense(self, device: str) -> nn.Module:
        from elfatt.integrations.mm_models import FixedWork, load_model

        path = CONFIGS / ("detection" if self.table == 6 else "segmentation") / f"{self.config}.py"
        if not path.is_file():
            raise FileNotFoundError(f"no config {path}: dense rows need a checkout of the repository")
        return FixedWork(load_model(path, device))


def select_rows(tables: list[int], patterns: list[str] | None = None) -> list[Row]:
    """Return the rows of tables, or those that match one of the patterns; see ``Row.fits``.

    Raises:
        ValueError: No such table, or a pattern without a match; the message suggests a close one.
    """
    rows = [Row(number, cells) for number in tables for cells in load_table(number)]
    if not patterns:
        return rows
    chosen = set()
    for pattern in patterns:
        fits = {i for i, row in enumerate(rows) if row.fits(pattern)}
        if not fits:
            names = {row.model.lower(): row.model for row in rows}
            close, numbers = closest(pattern.lower(), names), ", ".join(map(str, tables))
            hint = f"; did you mean {names[close]!r}?" if close else ""
            raise ValueError(f"no row {pattern!r} in table {numbers}{hint} (quote patterns)")
        chosen |= fits
    return [row for i, row in enumerate(rows) if i in chosen]
