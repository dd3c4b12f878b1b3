"""Random states go through files, and seeds leave the caller's numbers alone."""

import random

import numpy as np
import torch

from elfatt.randomness import rng_state, seeded, set_rng_state

CPU = torch.device("cpu")


def draw():
    return random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()  # each leaves half of a pair behind


def test_random_states_go_through_a_file(tmp_path):
    draw()
    torch.save(rng_state(CPU), tmp_path / "rng.pt")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), CPU)
    assert draw() == expected


def test_seeded_repeats_and_leaves_the_callers_numbers_alone():
    with seeded(1, 2, 3):
        first = draw()
    with seeded(1, 2, 3):
        assert draw() == first
    with seeded(1, 2, 4):
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = draw()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    with seeded(5):
        draw()
    assert draw() == expected
