"""Published tables of the paper (arXiv 2501.06098).

Empty cells are dashes in the paper. Multiply-adds are in units of 10⁹, parameters in units of 10⁶.
"""

from __future__ import annotations

import csv
from importlib.resources import files

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


def load_table(number: int) -> list[dict[str, str]]:
    """Load the rows of a published table, with cells as printed.

    Args:
        number: 1 to 9.

    Raises:
        ValueError: There is no such table.
    """
    if number not in FILES:
        raise ValueError(f"there is no table {number}: choose 1 to {len(FILES)}")
    with (files(__name__) / FILES[number]).open() as file:
        return list(csv.DictReader(file))
