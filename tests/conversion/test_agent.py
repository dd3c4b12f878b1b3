"""The rival Agent: its formula and its schedule, each step written out in float64."""

import pytest
import torch

from elfatt.conversion import Agent
from elfatt.conversion.agent import agent_attention
from elfatt.conversion.merging import Matching

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(q, k, v, agents, scale):
    """Head by head; scores of agents and queries have the scales ``scale`` and ``scale ** 0.3``."""
    out = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            gather = torch.softmax(agents[b, :, h] @ k[b, :, h].T * scale, dim=1)
            spread = torch.softmax(q[b, :, h] @ agents[b, :, h].T * scale**0.3, dim=1)
            out[b, :, h] = spread @ (gather @ v[b, :, h]) + 0.075 * v[b, :, h]
    return out


@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_formula(scale):
    q, k, v = (3 * draw(2, 12, 3, 4, seed=seed) for seed in range(3))
    agents = 3 * draw(2, 5, 3, 4, seed=3)
    found = agent_attention(q, k, v, agents, scale=scale)
    torch.testing.assert_close(found, expected(q, k, v, agents, scale or 4**-0.5))


def exact(q, k, v):
    weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5, dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@pytest.mark.parametrize("size", [(8, 12), (9, 10)])
def test_agents_of_the_early_steps(size):
    """Queries are projected before the tokens are merged here, and behind it in Agent: the projection is linear."""
    agent, x = Agent(), draw(1, size[0] * size[1], 6)
    merge, unmerge, attend = agent.merge(x, size, 0.39, GENERATOR)
    count = int(0.4 * x.shape[1])
    weights = [draw(6, 6, seed=seed) for seed in (1, 2, 3)]
    q, k, v = ((merge(x) @ weight).unflatten(-1, (2, 3)) for weight in weights)
    assert q.shape[1] == x.shape[1] - count
    matching = Matching(x, size, 4)
    most = min(int(0.95 * x.shape[1]), x.shape[1] - (size[0] // 4) * (size[1] // 4))
    agents = (matching.merge(x, most) @ weights[0]).unflatten(-1, (2, 3))
    found = attend("layer", q, k, v, None)
    torch.testing.assert_close(found, expected(q, k, v, agents, 3**-0.5))
    assert unmerge(found.flatten(2)).shape == x.shape
    torch.testing.assert_close(agent("next", q, k, v, None), exact(q, k, v))  # whose tokens nobody merged


def test_later_steps_are_plain_merging():
    agent, x, size = Agent(), draw(1, 96, 6), (8, 12)
    merge, unmerge, attend = agent.merge(x, size, 0.4, GENERATOR)
    assert attend is None
    matching, count = Matching(x, size, 2), int(0.4 * 96)
    torch.testing.assert_close(merge(x), matching.merge(x, count))
    torch.testing.assert_close(unmerge(merge(x)), matching.unmerge(matching.merge(x, count), count))
    q, k, v = (draw(1, 58, 2, 3, seed=seed) for seed in range(3))
    torch.testing.assert_close(agent("layer", q, k, v, None), exact(q, k, v))


def test_layers_of_a_whole_map_stay_exact():
    agent, x = Agent(), draw(1, 96, 6)
    agent.merge(x, (8, 12), 0.0, GENERATOR)
    q, k, v = (draw(1, 24, 2, 3, seed=seed) for seed in range(3))
    torch.testing.assert_close(agent("layer", q, k, v, (4, 6)), exact(q, k, v))
    torch.testing.assert_close(agent("layer", q, k, v, (4, 6), scale=3**-0.5), exact(q, k, v))


def test_cells_are_drawn_by_chance_in_even_batches_alone():
    size = (8, 12)
    x = draw(1, 96, 6)
    kept = [Agent().merge(x, size, 0.0, GENERATOR)[0](x) for _ in range(2)]
    assert torch.equal(*kept)
    agent, pair = Agent(), x.repeat(2, 1, 1)
    first, second = (agent.merge(pair, size, 0.0, GENERATOR)[0](pair) for _ in range(2))
    assert torch.equal(first[0], first[1]) and not torch.equal(first, second)
