"""Turns, their summary, and the refusal of what is wrong."""

import pytest
import timm
import torch

import elfatt  # noqa: F401
from elfatt.analysis import timing
from elfatt.analysis.timing import RunSpec, WrongOutput, check_numerics, summarize, time_in_turns
from elfatt.ops import active_backend
from elfatt.ops.pytorch import PyTorchBackend


def test_variants_take_turns_and_warm_up_does_not_count(monkeypatch):
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert found == {"a": summarize([1.0]), "b": summarize([1.0])}


def test_summary_is_median_and_quartiles():
    assert vars(summarize([4.0, 1.0, 2.0, 3.0, 5.0])) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "amp"])
@pytest.mark.parametrize("backend", ["math", "auto"])
def test_a_right_model_passes(precision, backend):
    model = timm.create_model("cswin_nano_elfatt", num_classes=10)
    error = check_numerics("it", model, (1, 3, 32, 48), RunSpec("cpu", precision, backend))
    assert 0 < error < (1e-5 if precision == "float32" else 0.5)


@pytest.mark.parametrize("precision", ["float32", "amp"])
def test_a_model_without_one_of_its_branches_is_refused(monkeypatch, precision):
    """With initial weights the linear branch is nearly the mean of V, which must not pass for it."""

    def mean_of_v(self, q, k, v):
        return v.mean(1, keepdim=True).expand_as(v)

    model = timm.create_model("cswin_nano_elfatt", num_classes=10)
    monkeypatch.setattr(PyTorchBackend, "efficient_attention", mean_of_v)
    with pytest.raises(WrongOutput, match="in float32"):
        check_numerics("it", model, (1, 3, 32, 48), RunSpec("cpu", precision, "sdpa"))


def test_a_wrong_model_is_refused():
    class Wrong(torch.nn.Module):
        """Off by a thousandth but where the formula runs."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.weight * (1 if active_backend() == "reference" else 1.001)

    with pytest.raises(WrongOutput, match="it is off by 1.0e-03 in float32"):
        check_numerics("it", Wrong(), (1, 3, 8, 8), RunSpec("cpu"))


def test_inference_runs_as_it_says():
    model = torch.nn.Conv2d(3, 4, 1)
    assert RunSpec("cpu", "bfloat16").prepare(model, (2, 3, 5, 5))().dtype == torch.bfloat16
    assert RunSpec("cpu", "amp").prepare(model, (2, 3, 5, 5))().dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="precision 'half' must be one of float32"):
        RunSpec("cpu", "half")
