"""Errors of known matrices."""

import pytest
import torch

from elfatt.conversion.measures import relative_error


@pytest.mark.parametrize(("norm", "wanted"), [("frobenius", 1 / 5), ("spectral", 1 / 4)])
def test_relative_errors_of_known_matrices(norm, wanted):
    exact = torch.diag(torch.tensor([3.0, 4.0])).double()
    assert relative_error(torch.zeros(2, 2).double(), exact, norm) == 1
    found = torch.diag(torch.tensor([3.0, 3.0])).double()
    assert relative_error(found, exact, norm) == pytest.approx(wanted)
    assert relative_error(torch.stack([found, exact]), exact, norm).tolist() == pytest.approx([wanted, 0])
