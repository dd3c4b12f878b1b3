"""Extended queries and keys against the biases written out."""

import torch

from elfatt.conversion.positions import with_relative_positions


def test_products_are_the_biased_scores():
    torch.manual_seed(0)
    height, width, heads, d = 3, 4, 2, 5
    q, k = torch.randn(2, 1, height * width, heads, d, dtype=torch.float64)
    rows, columns = (torch.randn(n, n, d, dtype=torch.float64) for n in (height, width))
    found = torch.einsum("bihc,bjhc->bhij", *with_relative_positions(q, k, rows, columns))
    for i in range(height * width):
        for j in range(height * width):
            bias = rows[i // width, j // width] + columns[i % width, j % width]
            wanted = (q[0, i] * (k[0, j] / d**0.5 + bias)).sum(-1)
            torch.testing.assert_close(found[0, :, i, j], wanted)
