"""What the README shows works."""

import re
from pathlib import Path

from elfatt.analysis.paper import load_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(example, names)
    assert names["logits"].shape == (1, 10)
    assert [tuple(m.shape[1:]) for m in names["maps"]] == [(64, 32, 83), (128, 16, 42), (256, 8, 21), (512, 4, 11)]
    assert names["tokens"].shape == (1, 30, 40, 64)


def test_every_file_it_names_is_there():
    names = re.findall(r"(?:scripts|configs|docs|elfatt|classification|segmentation|detection)/[\w./]*\w", README)
    missing = [name for name in names if not (ROOT / name).exists() and not name.startswith("runs")]
    assert not missing


def test_its_model_table_is_the_papers():
    rows = {(r["backbone"], r["attention"]): r for r in load_table(1) if r["resolution"] == "224"}
    header = re.search(r"^\| Mechanism \| (.*) \|$", README, re.M)[1]
    shells = re.findall(r"`(\w+)`", header)
    found = re.findall(r"^\| `(\w+)` \| (.* · .*) \|$", README, re.M)
    assert len(shells) == 4 and len(found) == 6
    for name, cells in found:
        expected = [rows[shell, name] for shell in shells]
        assert cells.split(" | ") == [f"{row['top1_percent']} · {row['gmacs_nfa']}" for row in expected]


def test_the_table_of_all_models_is_the_papers():
    rows = {(f"{r['backbone']}_{r['attention']}", r["resolution"]): r for r in load_table(1)}
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "models.md").read_text(), re.M)
    found = [(name, cells) for name, cells in found if (name, "224") in rows]
    assert len(found) == 24
    for name, cells in found:
        small, large = rows[name, "224"], rows.get((name, "384"))
        expected = [small["params_m"], small["gmacs_nfa"], small["gmacs_fa"] or "–", small["top1_percent"]]
        assert [c.strip() for c in cells.split("|")] == [*expected, large["top1_percent"] if large else ""]
