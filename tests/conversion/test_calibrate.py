"""What calibration measures is what a plan then does, and its choices follow from that."""

import pytest
import torch

from elfatt.conversion import Calibration, Head, LayerPlan, Plan, calibrate, hybrid_attention, multiply_adds

SIZE, WIDTH = (8, 12), 8
BLOCK, LINEAR = Head("block", 4), Head("linear")


def made(kinds, seed, batch=2):
    """q, k, v whose heads are local (they look into their own 4 × 4 block), global (everywhere alike) or neither."""
    generator = torch.Generator().manual_seed(seed)
    tokens = SIZE[0] * SIZE[1]
    row, column = torch.arange(tokens) // SIZE[1], torch.arange(tokens) % SIZE[1]
    code = torch.nn.functional.one_hot(row // 4 * (SIZE[1] // 4) + column // 4, WIDTH).double() * 5
    noise = torch.randn(2, batch, tokens, len(kinds), WIDTH, generator=generator, dtype=torch.float64)
    q, k = (torch.zeros_like(noise[0]), torch.zeros_like(noise[0]))
    for head, kind in enumerate(kinds):
        for index, x in enumerate((q, k)):
            x[:, :, head] = {
                "local": code,
                "global": 0.01 * noise[index][:, :, head],
                "neither": 3 * noise[index][:, :, head],
            }[kind]
    v = torch.randn(batch, tokens, len(kinds), WIDTH, generator=generator, dtype=torch.float64)
    return q, k, v


LAYERS = {"a": ("local", "global", "neither"), "b": ("global", "local")}


def run(batch, attend):
    return {name: attend(name, *made(kinds, seed=batch + len(kinds)), SIZE) for name, kinds in LAYERS.items()}


def calibrated(**options):
    calibration = Calibration("made", (BLOCK, LINEAR), **options)
    for batch in range(3):
        run(batch, calibration.attend)
    return calibration


def measured_error(plan):
    """The error of a plan by its definition, over the same batches."""
    squares = []
    for name, kinds in LAYERS.items():
        rest, norm = 0.0, 0.0
        for batch in range(3):
            qkv = made(kinds, seed=batch + len(kinds))
            exact = hybrid_attention(*qkv, SIZE, LayerPlan((Head(),) * len(kinds)))
            rest += (hybrid_attention(*qkv, SIZE, plan.layers[name]) - exact).square().sum().item()
            norm += exact.square().sum().item()
        squares.append(rest / norm)
    return (sum(squares) / len(squares)) ** 0.5


def test_local_and_global_heads_are_found():
    plan = calibrated().plan(error=0.005)
    assert plan.layers["a"].heads == (BLOCK, LINEAR, Head())
    assert plan.layers["b"].heads == (LINEAR, BLOCK)


@pytest.mark.parametrize("shortcut", [False, True])
def test_plans_keep_their_budget_and_grow_no_dearer_with_it(shortcut):
    calibration = calibrated(shortcut=shortcut)
    costs = []
    for budget in (0, 0.001, 0.01, 0.05, 0.1, 0.3, 0.6, 1, 10):
        plan = calibration.plan(error=budget)
        assert measured_error(plan) <= budget + 1e-9
        assert measured_error(plan) == pytest.approx(calibration.error(plan), abs=1e-6)
        costs.append(calibration.relative_cost(plan))
    assert costs == sorted(costs, reverse=True) and costs[0] == 1 and costs[-1] < 0.2
    if shortcut:
        assert any(head.shortcut for layer in plan.layers.values() for head in layer.heads)
        assert calibration.error(plan) < calibrated().error(calibrated().plan(error=10))


def test_a_cost_budget_is_reached_with_the_fewest_steps():
    calibration = calibrated()
    errors = []
    for budget in (1, 0.9, 0.6, 0.3):
        plan = calibration.plan(cost=budget)
        assert calibration.relative_cost(plan) <= budget
        errors.append(calibration.error(plan))
    assert errors == sorted(errors) and errors[0] == 0
    with pytest.raises(ValueError, match=r"cost=0.01 cannot be reached: the cheapest choice costs 0\.\d+"):
        calibration.plan(cost=0.01)


def test_a_cost_budget_ends_with_the_cheapest_head_that_reaches_it():
    calibration = Calibration("made", (BLOCK, Head("block", 6), LINEAR))
    run(0, calibration.attend)
    for budget in (0.95, 0.8, 0.7, 0.5, 0.35):
        plan = calibration.plan(cost=budget)
        for name, layer in plan.layers.items():  # no head can take back its step, or part of it, within the budget
            for head, current in enumerate(layer.heads):
                for other in (Head(), *calibration.candidates):
                    heads = (*layer.heads[:head], other, *layer.heads[head + 1 :])
                    changed = Plan("made", {**plan.layers, name: LayerPlan(heads)})
                    if other != current and calibration.relative_cost(changed) <= budget:
                        assert calibration.error(changed) >= calibration.error(plan)


def test_the_model_goes_on_exactly_and_the_same_data_give_the_same_plan():
    calibration = Calibration("made", (BLOCK, LINEAR))
    found = run(0, calibration.attend)
    for name, kinds in LAYERS.items():
        exact = hybrid_attention(*made(kinds, seed=len(kinds)), SIZE, LayerPlan((Head(),) * len(kinds)))
        assert torch.equal(found[name], exact)
    plans = {str(calibrate("made", run, range(3), error=0.2)) for _ in range(2)}
    assert len(plans) == 1


OUTPUT = {"a": 0.001, "b": 3.0}  # what the model makes of its layers: their sum, so scaled


def weighed():
    """Calibrated on a model whose output depends on one layer far more than on the other."""
    calibration = calibrated()
    for batch in range(3):

        def call(batch=batch):
            found = run(batch, calibration.attend)
            return torch.cat([OUTPUT[name] * out.flatten() for name, out in found.items()])

        calibration.weigh(call, call())
    return calibration


def output_error(plan):
    """The error of the model's output by its definition, over the same batches."""

    def out(batch, layers):
        found = run(batch, lambda name, q, k, v, size: hybrid_attention(q, k, v, size, layers[name]))
        return torch.cat([OUTPUT[name] * x.flatten() for name, x in found.items()])

    exact = {name: LayerPlan((Head(),) * len(kinds)) for name, kinds in LAYERS.items()}
    pairs = [(out(batch, plan.layers), out(batch, exact)) for batch in range(3)]
    return (sum(((a - b).norm() / b.norm()) ** 2 for a, b in pairs) / len(pairs)).sqrt().item()


def test_weighed_layers_give_the_error_of_the_output():
    calibration = weighed()
    costs = []
    for budget in (0, 0.001, 0.01, 0.1, 0.3, 1, 3):
        plan = calibration.plan(error=budget)
        assert output_error(plan) == pytest.approx(calibration.error(plan), rel=0.02)
        assert output_error(plan) <= budget * 1.02
        costs.append(calibration.relative_cost(plan))
    assert costs == sorted(costs, reverse=True) and costs[0] == 1


def test_layers_that_the_output_hardly_needs_go_first():
    plan = weighed().plan(error=0.005)
    assert "exact" not in {head.branch for head in plan.layers["a"].heads}
    assert calibrated().plan(error=0.005).layers["a"].heads[2] == Head()


def test_weighing_leaves_the_measured_errors_alone():
    before, after = calibrated(), weighed()
    for batch in range(3):
        run(batch, before.attend)  # weigh was given a call that counts
    for name in LAYERS:
        torch.testing.assert_close(after.layers[name].rest, before.layers[name].rest, rtol=1e-12, atol=0)
        assert after.layers[name].probe > 0


def test_short_inputs_stay_exact():
    calibration = calibrated(min_tokens=97)
    with pytest.raises(ValueError, match="made: no self-attention of 97 or more tokens was seen"):
        calibration.plan(error=1)
    assert calibrated(min_tokens=96).plan(error=10).layers["a"].min_tokens == 96


def test_costs_are_multiply_adds():
    assert multiply_adds(Head(), (4, 6), 0, 8) == 2 * 24 * 24 * 8
    assert multiply_adds(Head("block", 2), (4, 6), 1, 8) == 2 * 24 * (4 + 1) * 8
    assert multiply_adds(Head("block", 5), (4, 6), 0, 8) == 2 * 24 * (4 * 5) * 8
    assert multiply_adds(LINEAR, (4, 6), 0, 8) == 2 * 24 * 8 * 8
    seen = calibrated(cost=lambda head, size, prefix, width: {"exact": 4.0, "linear": 2.0, "block": 1.0}[head.branch])
    assert seen.relative_cost(seen.plan(error=0.005)) == pytest.approx((1 + 2 + 4 + 2 + 1) / 20)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "pass exactly one"),
        ({"error": 1, "cost": 1}, "pass exactly one"),
        ({"error": -1}, "error=-1 must be at least 0"),
        ({"cost": 0}, r"cost=0 \(the budget\) must be in \(0, 1\]"),
    ],
)
def test_a_budget_out_of_range_is_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        calibrated().plan(**budget)


def test_non_finite_attention_is_named():
    calibration = Calibration("made", (BLOCK,))
    q, k, v = made(LAYERS["a"], seed=0)
    v[0, 0] = torch.inf
    calibration.attend("a", q, k, v, SIZE)
    with pytest.raises(ValueError, match="a: non-finite attention output: calibrate in float32 or bfloat16"):
        calibration.plan(cost=0.5)


def test_candidates_and_plans_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be linear or block heads without shortcut"):
        Calibration("made", (Head(),))
    other = Calibration("made", (Head("block", 2),))
    run(0, other.attend)
    with pytest.raises(ValueError, match="'linear' was not measured; the candidates are block 2"):
        other.error(calibrated().plan(error=0.05))
