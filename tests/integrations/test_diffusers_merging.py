"""Token merging, and attention of any other kind, in diffusion models."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler  # noqa: E402

from elfatt.conversion import Agent, Head, Plan  # noqa: E402
from elfatt.integrations import diffusers as adapter  # noqa: E402
from tests.integrations.test_diffusers import MODELS, SIZE, assert_same_state, plan_of, state, unet  # noqa: E402


@pytest.fixture
def merging():
    """A UNet, and its output for two pictures from a fixed state of the generator."""
    torch.manual_seed(0)
    model, call = unet()
    model.eval()
    x = torch.randn(2, 4, *SIZE)

    def run(t=500, x=x):
        torch.manual_seed(1)
        with torch.no_grad():
            return call(model, x, torch.tensor([t] * len(x)))

    run.x = x
    return model, run


@pytest.mark.parametrize("count", [1, 2])  # pictures; destinations are chosen by chance where guidance has pairs
def test_merging_is_tomesd_and_leaves_no_trace(merging, count):
    tomesd = pytest.importorskip("tomesd")
    model, run = merging
    x = run.x[:count]
    before, clean = run(x=x), state(model)
    with adapter.apply(model, plan_of(model, Head()), merge_ratio=0.5):
        found = run(x=x)
    assert_same_state(state(model), clean)
    assert not any("tomesd" in type(module).__module__ or hasattr(module, "_tome_info") for module in model.modules())
    assert torch.equal(run(x=x), before)
    tomesd.apply_patch(model, ratio=0.5)
    assert torch.equal(found, run(x=x)) and not torch.equal(found, before)


def test_merged_tokens_have_no_map(merging):
    """Their block heads are exact, whatever the block; those of smaller maps, which are not merged, are not."""
    pytest.importorskip("tomesd")
    model, run = merging
    with adapter.apply(model, plan_of(model, Head()), merge_ratio=0.75):  # as many tokens as the next level has
        exact = run()
    first = {name for name in adapter.self_attention_layers(model) if name.startswith(("down_blocks.0", "up_blocks.1"))}
    plans = [
        Plan(
            adapter.name_of(model),
            {name: layer for name, layer in plan_of(model, head).layers.items() if (name in first) == large},
        )
        for head, large in ((Head("block", 2), True), (Head("block", 2), False), (Head("linear"), True))
    ]
    found = []
    for plan in plans:
        with adapter.apply(model, plan, merge_ratio=0.75):
            found.append(run())
    torch.testing.assert_close(found[0], exact)
    assert all((other - exact).abs().max() > 1e-3 for other in found[1:])


def test_agent_is_applied_by_its_steps_and_removed(merging):
    model, run = merging
    before, clean = [run(900), run(100)], state(model)
    with adapter.apply(model, Agent(), scheduler=DDIMScheduler()):
        found = [run(900), run(100)]
        one = run(100, run.x[:1])
    assert_same_state(state(model), clean)
    assert torch.equal(run(900), before[0])
    assert all(not torch.equal(*pair) for pair in zip(found, before, strict=True))
    with adapter.apply(model, Agent(), steps=(0.0, 0.5), scheduler=DDIMScheduler()):
        assert torch.equal(run(100), before[1])
    pytest.importorskip("tomesd")
    with adapter.apply(model, plan_of(model, Head()), merge_ratio=0.4):
        torch.testing.assert_close(run(100, run.x[:1]), one)


@pytest.mark.parametrize(("plan", "steps"), [(None, (0.5, 1.0)), (None, (0.0, 1.0)), (Agent(), (0.0, 1.0))])
def test_the_last_step_is_one_of_all(merging, plan, steps):
    """Time step 0, where all of the steps are done."""
    model, run = merging
    before = run(0)
    with adapter.apply(model, plan, block=2, min_tokens=0, steps=steps, scheduler=DDIMScheduler()):
        assert not torch.equal(run(0), before)


@pytest.mark.parametrize("name", MODELS)
def test_any_function_is_a_plan(name):
    """It sees every layer with the size of its map."""
    model, call = MODELS[name]()
    seen = {}

    def attend(layer, q, k, v, size, *, prefix=0, scale=None):
        seen[layer] = size, tuple(q.shape)
        return v

    with adapter.apply(model, attend), torch.no_grad():
        call(model, torch.randn(2, 4, 8, 8), torch.tensor([500, 500]))
    layers = adapter.self_attention_layers(model)
    assert set(seen) == set(layers)
    for layer, (size, shape) in seen.items():
        assert size in ((8, 8), (4, 4)) and shape[1] == size[0] * size[1] and shape[2] == layers[layer].heads


@pytest.mark.parametrize("name", MODELS)
def test_merging_that_cannot_be_done_is_named(name):
    model, _ = MODELS[name]()
    handle = adapter.apply(model, min_tokens=0)
    applied = state(model)
    for ratio in (-0.1, 0.8):
        with pytest.raises(ValueError, match=f"^merge_ratio={ratio} must be from 0 to 0.75.*$"):
            adapter.apply(model, merge_ratio=ratio)
    with pytest.raises(ValueError, match="^merge_ratio=0.5 must be 0: Agent already merges tokens$"):
        adapter.apply(model, Agent(), merge_ratio=0.5, scheduler=DDIMScheduler())
    if name != "unet":
        pytest.importorskip("tomesd")
        for plan, ratio in ((None, 0.5), (Agent(), 0.0)):
            with pytest.raises(
                TypeError, match=f"^tokens of {type(model).__name__} cannot be merged: tomesd and Agent support.*$"
            ):
                adapter.apply(model, plan, merge_ratio=ratio, scheduler=DDIMScheduler())
    assert_same_state(state(model), applied)  # what was there before stays
    handle.remove()
