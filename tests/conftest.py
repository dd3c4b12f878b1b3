"""Before any test."""

import torch

from elfatt import ops

ops.can_run_cpp(torch.empty(1, 1, 1, 1))  # compiles: a test that hides the compiler must not decide it for the rest
