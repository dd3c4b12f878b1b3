"""Parameters and multiply-adds of every row of Tables I to V equal the printed figures."""

import pytest
import timm
import torch

import elfatt  # noqa: F401  registers the models
from elfatt.analysis.complexity import measure_complexity
from elfatt.analysis.paper import classification_model, load_table

ROWS = [(n, row) for n in (1, 2, 3, 4, 5) for row in load_table(n)]


def describe(case):
    number, row = case
    return f"table{number}-" + "-".join(str(row[key]).replace(" ", "") for key in list(row)[:4])


@pytest.mark.parametrize("case", ROWS, ids=describe)
def test_counts_equal_the_printed_figures(case):
    number, row = case
    name, options = classification_model(number, row)
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    side = options.get("img_size", 224)
    found = measure_complexity(model, (side, side))
    assert f"{found.params / 1e6:.0f}" == row["params_m"]
    assert f"{found.macs_nfa / 1e9:.2f}" == row["gmacs_nfa"]
    if row["gmacs_fa"]:
        assert f"{found.macs_fa / 1e9:.2f}" == row["gmacs_fa"]
    if name == "vmamba_tiny":
        assert f"{found.macs_true / 1e9:.2f}" == "4.91"  # as its authors publish it, with the scan
    else:
        assert found.macs_true == found.macs_nfa


def test_every_row_is_compared():
    assert len(ROWS) == 38 + 4 + 4 + 6 + 5


@pytest.mark.parametrize("number", [8, 9])
def test_models_of_the_edge_tables_are_counted(number):
    for row in load_table(number):
        name, options = classification_model(number, row)
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        found = measure_complexity(model, (224, 224))
        assert found.macs_true == found.macs_nfa >= found.macs_fa > 1e9
    assert (name, f"{found.params / 1e6:.1f}") == ("efficientvit_b2", "24.3")


def test_dense_tables_have_no_classification_model():
    with pytest.raises(ValueError, match="no model stands behind this row of table 7"):
        classification_model(7, load_table(7)[-1])
