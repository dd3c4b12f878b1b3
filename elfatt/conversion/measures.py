"""Error measures between attention and its replacement."""

from __future__ import annotations

import torch

NORMS = {"frobenius": "fro", "spectral": 2}


def relative_error(found: torch.Tensor, exact: torch.Tensor, norm: str = "frobenius") -> torch.Tensor:
    """Return ``‖found − exact‖ / ‖exact‖`` of matrices ``[..., N, M]`` in one of ``NORMS``: ``[...]``."""
    kind = NORMS[norm]
    return torch.linalg.matrix_norm(found - exact, kind) / torch.linalg.matrix_norm(exact, kind)
