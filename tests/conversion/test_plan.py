"""Plans go to and from JSON, print as a table and refuse a model that they were not made for."""

import pytest

from elfatt.conversion import Head, LayerPlan, Plan

PLAN = Plan(
    "unet",
    {
        "down.0": LayerPlan((Head("linear", temperature=2.0), Head("block", 8, shortcut=0.1), Head("block", 8)), 1024),
        "mid": LayerPlan((Head(), Head())),
    },
)


def test_a_plan_goes_through_a_file(tmp_path):
    PLAN.to_json(tmp_path / "plan.json")
    assert Plan.from_json(tmp_path / "plan.json") == PLAN
    with_lepe = Plan("vit", {"a": LayerPlan((Head(),))}, lepe=True)
    with_lepe.to_json(tmp_path / "plan.json")
    assert Plan.from_json(tmp_path / "plan.json") == with_lepe and "1 layers, with LePE" in str(with_lepe)


def test_a_plan_prints_as_a_table():
    assert str(PLAN).splitlines() == [
        "plan for unet: 2 layers",
        "  down.0  1 x linear T=2, 1 x block 8 +0.1V, 1 x block 8  from 1024 tokens",
        "  mid     2 x exact",
    ]


def test_half_of_the_heads_are_linear_in_a_uniform_plan():
    plan = Plan.uniform("unet", {"a": 5, "b": 1}, block=4, min_tokens=64)
    assert [head.branch for head in plan.layers["a"].heads] == ["linear"] * 2 + ["block"] * 3
    assert [head.branch for head in plan.layers["b"].heads] == ["block"]
    assert plan.layers["a"].heads[-1] == Head("block", 4) and plan.layers["a"].min_tokens == 64
    plan = Plan.uniform("unet", {"a": 4}, global_branch="exact")
    assert [head.branch for head in plan.layers["a"].heads] == ["exact"] * 2 + ["block"] * 2


def test_a_number_of_tokens_is_whole():
    with pytest.raises(ValueError, match="min_tokens='1024' must be a number of tokens"):
        LayerPlan((Head(),), min_tokens="1024")


@pytest.mark.parametrize(
    ("model", "heads", "message"),
    [
        ("dit", {"down.0": 3, "mid": 2}, "the plan was made for unet, not for dit"),
        ("unet", {"down.0": 3}, "has layer 'mid', which unet does not have"),
        ("unet", {"down.0": 4, "mid": 2}, "3 heads for down.0 but unet has 4"),
    ],
)
def test_a_plan_of_another_model_is_refused(model, heads, message):
    PLAN.check("unet", {"down.0": 3, "mid": 2, "more": 8})
    with pytest.raises(ValueError, match=message):
        PLAN.check(model, heads)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"branch": "local"}, "branch='local' must be one of exact, linear, block"),
        ({"branch": "block"}, "block=0 must be the block side"),
        ({"branch": "linear", "block": 4}, "block=4 must be"),
        ({"branch": "block", "block": 8.5}, "block=8.5 must be"),
        ({"branch": "block", "block": "8"}, "block='8' must be"),
        ({"branch": "linear", "temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"branch": "block", "block": 2, "temperature": 2.0}, "temperature=2.0 must be above 0, and 1 unless"),
        ({"shortcut": 0.1}, "shortcut=0.1 must be 0 for branch 'exact'"),
    ],
)
def test_a_head_out_of_range_is_refused(head, message):
    with pytest.raises(ValueError, match=message):
        Head(**head)


@pytest.mark.parametrize("text", ["", "[]", '{"model": "a"}', '{"model": "a", "layers": {"x": {"heads": [{"z": 1}]}}}'])
def test_a_file_without_a_plan_is_named(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json is not a plan"):
        Plan.from_json(tmp_path / "plan.json")
