"""The tables of the paper (arXiv 2501.06098), as published, and the model behind each row.

An empty cell is a dash in the paper. Multiply-adds are in units of 10⁹, parameters in units of 10⁶.
"""

from __future__ import annotations

import csv
from importlib.resources import files
from math import isqrt

from elfatt.analysis.complexity import Complexity

FILES = {
    1: "table1_imagenet.csv",
    2: "table2_block_size.csv",
    3: "table3_lepe.csv",
    4: "table4_levels.csv",
    5: "table5_channel_split.csv",
    6: "table6_coco.csv",
    7: "table7_ade20k.csv",
    8: "table8_jetson_agx_orin.csv",
    9: "table9_jetson_nano.csv",
}

# systems without an attention of their own in the tables, by their name there
OTHERS = {"ConvNeXt-T": "convnext_tiny", "VMamba-T": "vmamba_tiny", "EfficientViT-B2": "efficientvit_b2"}


def load_table(number: int) -> list[dict[str, str]]:
    """Rows of one published table, every cell as printed.

    Args:
        number: 1 to 9.

    Raises:
        ValueError: There is no such table.
    """
    if number not in FILES:
        raise ValueError(f"there is no table {number}: choose 1 to {len(FILES)}")
    with (files(__name__) / FILES[number]).open(newline="") as file:
        return list(csv.DictReader(file))


def classification_model(number: int, row: dict[str, str]) -> tuple[str, dict]:
    """The ``timm.create_model`` name and keywords of a row of Tables I to V, VIII or IX.

    Tables II to V vary CSWin-T-ELFATT, with blocks of 14×14 but where the row says otherwise.

    Raises:
        ValueError: The row belongs to a table of dense models.
    """
    if number in (1, 8, 9) and not row["attention"]:
        return OTHERS[row["backbone"]], {}
    if number in (1, 8, 9):
        return f"{row['backbone']}_{row['attention']}", {"img_size": int(row.get("resolution", 224))}
    if number == 2:
        return "cswin_tiny_elfatt", {
            "block_size": [isqrt(int(row[f"tokens_per_block_level{i}"])) for i in (1, 2, 3, 4)]
        }
    base = {"block_size": 14}
    if number == 3:
        name = "cswin_tiny_global" if "GLOBAL" in row["model"] else "cswin_tiny_elfatt"
        return name, {**base, "lepe": row["lepe"] == "yes"}
    if number == 4:
        return "cswin_tiny_elfatt", {**base, "levels": row["levels_1_to_4"].split()}
    if number == 5 and row["c1_over_c"] == "1":
        return "cswin_tiny_effatt", {}
    if number == 5:
        return "cswin_tiny_elfatt", {**base, "channel_split": float(row["c1_over_c"])}
    raise ValueError(f"no model stands behind this row of table {number}: {row}")


def printed_macs(number: int, row: dict[str, str], found: Complexity) -> int:
    """The count that the column ``gmacs_nfa`` of a row prints.

    VMamba-T's selective scan is left out in Table I and counted in Tables VI and VII.
    """
    return found.macs_true if number in (6, 7) and row["model"] == "VMamba-T" else found.macs_nfa
