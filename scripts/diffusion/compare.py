"""Train small diffusion models on real digits, replace their attention without retraining, and report the quality.

All variants start from the noise of the unpatched model, so that their images are compared in pairs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

from elfatt.analysis.complexity import count_true
from elfatt.analysis.diffusion_quality import psnr
from elfatt.console import replace_unprintable
from elfatt.conversion import Agent, Calibration, Head, LayerPlan, Plan
from elfatt.integrations import diffusers as adapter
from scripts.diffusion import quality
from scripts.diffusion.generators import CLASSES, MODELS, PHASES, SIDE, sample, sampler, save, train
from scripts.diffusion.outcome import RIVALS, UNPATCHED, Result, write_report
from scripts.quickstart.material import load_material

PICTURES, BATCH, STEPS = 120, 40, 8
CALIBRATION_PICTURES = 20
BUDGETS = (0.75, 0.5, 0.3, 0.1)  # plus the cost of each rival


class Subject:
    """A trained model and its calibration.

    Args:
        name: One of ``MODELS``.
        model: The model.
        steps: Number of sampling steps.
    """

    def __init__(self, name: str, model: nn.Module, steps: int):
        self.name, self.model, self.steps = name, model, steps

    @cached_property
    def calibration(self) -> Calibration:
        """Calibration on images outside the evaluated samples."""
        batches = (torch.arange(CALIBRATION_PICTURES) % CLASSES).split(CLASSES // 2)

        def run(number):
            sample(self.model, batches[number], self.steps, seed=-1 - number)

        return adapter.calibrate(self.model, run, trange(len(batches), desc=f"calibrating {self.name}", unit="batch"))

    def plan(self, cost: float, shortcut: bool) -> Plan:
        """Return the calibrated plan for a budget, with or without the V shortcut."""
        calibration = copy.copy(self.calibration)  # both kinds of errors are measured in one pass
        calibration.shortcut = shortcut
        return calibration.plan(cost=cost)

    def exact(self) -> Plan:
        """Return a plan that replaces nothing."""
        return Plan(adapter.name_of(self.model))

    def every_head(self, head: Head) -> Plan:
        """Return a plan with one branch in all heads of the full-resolution layers, which the rivals replace."""
        layers = adapter.self_attention_layers(self.model)
        return Plan(
            adapter.name_of(self.model),
            {name: LayerPlan((head,) * layer.heads, min_tokens=SIDE * SIDE) for name, layer in layers.items()},
        )


@dataclass(frozen=True)
class Variant:
    """A replacement of attention.

    Attributes:
        family: Variants of one family share a curve.
        options: Keyword arguments of ``elfatt.integrations.diffusers.apply``, or None for the unpatched model.
    """

    family: str
    options: Callable[[Subject], dict] | None


VARIANTS: dict[str, Variant] = {
    UNPATCHED: Variant(UNPATCHED, None),
    "ELFATT, uniform": Variant("ELFATT, uniform", lambda subject: {}),
    "linear alone": Variant("linear alone", lambda subject: {"plan": subject.every_head(Head("linear"))}),
    "blocks of 8 alone": Variant("blocks alone", lambda subject: {"plan": subject.every_head(Head("block", 8))}),
    **{
        f"{family}, {budget:.0%}": Variant(
            family,
            lambda subject, budget=budget, shortcut=shortcut: {"plan": subject.plan(budget, shortcut)},
        )
        for family, shortcut in {"ELFATT, calibrated": False, "ELFATT, calibrated + V": True}.items()
        for budget in BUDGETS
    },
    **{
        f"ToMe {ratio}": Variant("ToMe", lambda subject, ratio=ratio: {"plan": subject.exact(), "merge_ratio": ratio})
        for ratio in (0.25, 0.5, 0.75)
    },
    "Agent": Variant("Agent", lambda subject: {"plan": Agent()}),
}


def load_digits() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return images ``[N, 1, SIDE, SIDE]`` in -1…1 and labels ``[N]`` of the splits ``train`` and ``val``."""
    images, labels = {}, {}
    for split, material in load_material().items():
        ink = torch.tensor(material.digits, dtype=torch.float32)[:, None] / 8 - 1
        images[split] = F.interpolate(ink, size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)
        labels[split] = torch.tensor(material.labels)
    return images, labels


def patched(subject: Subject, variant: Variant):
    """Return the context in which the subject's model runs a variant."""
    if variant.options is None:
        return nullcontext()
    return adapter.apply(subject.model, scheduler=sampler(subject.steps), **variant.options(subject))


def supported(subject: Subject, variants: dict[str, Variant]) -> tuple[dict[str, Variant], dict[str, str]]:
    """Return the variants that a model supports, and why it does not support the others."""
    refused = {}
    for name, variant in variants.items():
        try:
            with patched(subject, variant):
                pass
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
    return {name: variant for name, variant in variants.items() if name not in refused}, refused


def at_equal_cost(variants: dict[str, Variant], shares: dict[str, float]) -> dict[str, Variant]:
    """Return a calibrated plan at the cost of each rival."""
    family = "ELFATT, calibrated + V"
    return {
        f"{family}, {share:.1%}": Variant(
            family, lambda subject, share=share: {"plan": subject.plan(share, shortcut=True)}
        )
        for share in (min(shares[name], 1.0) for name, variant in variants.items() if variant.family in RIVALS)
    }


def attention_share(subject: Subject, variants: dict[str, Variant]) -> dict[str, float]:
    """Return each variant's multiply-adds in attention as a share of the unpatched model's.

    Sampling is counted as a whole, so everything a variant adds (token matching) or saves (projections of merged
    tokens) is attributed to attention.
    """
    attention, labels = 0.0, torch.zeros(2, dtype=torch.long)  # even batch: ToMe is not random for odd ones

    def count(layer, q, k, v, size, *, prefix=0, scale=None):
        nonlocal attention
        attention += 2 * q.numel() * k.shape[1]
        return v

    with adapter.apply(subject.model, count):
        sample(subject.model, labels, subject.steps, seed=0)
    totals = {}
    for name, variant in variants.items():
        with patched(subject, variant), count_true() as total:
            sample(subject.model, labels, subject.steps, seed=0)
            totals[name] = total()
    return {name: 1 - (totals[UNPATCHED] - total) / attention for name, total in totals.items()}


def draw_samples(
    subject: Subject, variants: dict[str, Variant], path: Path, pictures: int, batch: int
) -> dict[str, tuple[torch.Tensor, list[float]]]:
    """Sample images of every variant from the same noise, and time each batch in seconds per step.

    Variants take turns batch by batch, so that background load affects them equally.

    Args:
        subject: The model.
        variants: Variants to compare.
        path: File that keeps finished turns until the report is written.
        pictures: Images per variant, cycling through the classes.
        batch: Images per turn.
    """
    kept = torch.load(path, weights_only=True) if path.exists() else {}
    labels = (torch.arange(pictures) % CLASSES).split(batch)
    turns = [(number, name) for number in range(len(labels)) for name in variants]
    for number, name in tqdm(turns, desc=f"sampling {subject.name}", unit="turn"):
        if (name, number) in kept:
            continue
        torch.manual_seed(number)  # token merging is random
        with patched(subject, variants[name]):
            start = time.perf_counter()
            found = sample(subject.model, labels[number], subject.steps, seed=number)
            kept[name, number] = found, (time.perf_counter() - start) / subject.steps
        save(kept, path)
    return {
        name: (torch.cat([part for part, _ in turns]), [seconds for _, seconds in turns])
        for name in variants
        for turns in [[kept[name, number] for number in range(len(labels))]]
    }


def compare(
    variants: dict[str, Variant],
    shares: dict[str, float],
    classifier: nn.Module,
    real: torch.Tensor,
    samples: dict[str, tuple[torch.Tensor, list[float]]],
) -> list[Result]:
    """Compare the samples of each variant with the unpatched ones.

    Args:
        variants: Compared variants.
        shares: Result of ``attention_share``.
        classifier: Classifier of the images.
        real: Images of real digits ``[M, 1, SIDE, SIDE]`` in 0…1.
        samples: Result of ``draw_samples``.
    """
    real_features, _ = quality.judge(classifier, real)
    wanted, wanted_seconds = samples[UNPATCHED]
    wanted_features, _ = quality.judge(classifier, wanted)
    results = []
    for name, (pictures, seconds) in samples.items():
        features, classes = quality.judge(classifier, pictures)
        right = classes == torch.arange(len(pictures)) % CLASSES
        results.append(
            Result(
                name=name,
                family=variants[name].family,
                share=shares[name],
                psnr=psnr(255 * pictures, 255 * wanted),
                features=quality.feature_distance(features, wanted_features),
                accuracy=100 * right.double().mean().item(),
                frechet=quality.frechet_distance(features, real_features),
                seconds=statistics.median(seconds),
                speed=statistics.median(w / s for w, s in zip(wanted_seconds, seconds, strict=True)),
            )
        )
    return results


def main(argv: list[str] | None = None) -> None:
    """Train the models unless already trained, compare the variants and write the report."""
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder for models, samples and report")
    root = parser.parse_args(argv).root
    images, labels = load_digits()
    torch.manual_seed(0)
    classifier = quality.train_classifier(images["train"], labels["train"], root / "classifier.pt")
    _, classes = quality.judge(classifier, images["val"] / 2 + 0.5)
    right = 100 * (classes == labels["val"]).double().mean().item()
    real = torch.cat([*images.values()]) / 2 + 0.5
    results, grids, refused = {}, {}, {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = train(build(), images["train"], labels["train"], root / f"{name}.pt", PHASES[name])
        subject = Subject(name, model, STEPS)
        variants, refused[name] = supported(subject, VARIANTS)
        shares = attention_share(subject, variants)
        equals, left_out = supported(subject, at_equal_cost(variants, shares))
        variants, refused[name] = variants | equals, refused[name] | left_out
        shares |= attention_share(subject, {UNPATCHED: variants[UNPATCHED]} | equals)
        samples = draw_samples(subject, variants, root / f"{name}-samples.pt", PICTURES, BATCH)
        results[name] = compare(variants, shares, classifier, real, samples)
        grids[name] = {variant: pictures[:CLASSES] for variant, (pictures, _) in samples.items()}
    write_report(root, results, grids, refused, classifier_accuracy=right, pictures=PICTURES, steps=STEPS)
    for name in MODELS:
        (root / f"{name}-samples.pt").unlink()  # another run samples and times again


if __name__ == "__main__":
    main()
