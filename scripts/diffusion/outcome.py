"""Write the report of the comparison: a table, images, curves of quality over cost, and conclusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter

from elfatt.analysis.diffusion_quality import MAX_PSNR

UNPATCHED, UNIFORM, CALIBRATED = "unpatched", "ELFATT, uniform", "ELFATT, calibrated"
TRAINED = 80.0  # minimum accuracy in % of the unpatched model for a meaningful comparison
RIVALS = ("ToMe", "Agent")
HALF, POINT = 0.5, 1.0  # goal: maximum share of the multiply-adds, and maximum loss of accuracy in points


@dataclass(frozen=True)
class Result:
    """Results of one variant.

    Attributes:
        name: Name of the variant.
        family: Its curve in the plots.
        share: Attention's multiply-adds over the unpatched model's.
        psnr: PSNR to the unpatched images in dB, ``MAX_PSNR`` if equal.
        features: Relative distance of the classifier's features to the unpatched ones.
        accuracy: Images classified as their class, in %.
        frechet: Fréchet distance of the classifier's features to those of real digits.
        seconds: Seconds per step.
        speed: Speed-up over the unpatched model in the same turn.
    """

    name: str
    family: str
    share: float
    psnr: float
    features: float
    accuracy: float
    frechet: float
    seconds: float
    speed: float


def write_report(
    root: Path,
    results: dict[str, list[Result]],
    grids: dict[str, dict[str, torch.Tensor]],
    refused: dict[str, dict[str, str]],
    *,
    classifier_accuracy: float,
    pictures: int,
    steps: int,
) -> None:
    """Write ``report.md``, ``grid.png`` and ``curves.png``, and print the report.

    Args:
        root: Output folder.
        results: Results of every variant by model, the unpatched one first.
        grids: Images ``[digits, 1, H, W]`` in 0…1 by model and variant.
        refused: Unsupported variants by model, and why.
        classifier_accuracy: Accuracy on real held-out digits, in %.
        pictures: Number of images per variant.
        steps: Number of sampling steps.
    """
    draw_grid(results, grids, root / "grid.png")
    draw_curves(results, root / "curves.png")
    parts = [f"## {name}\n\n{table(rows)}\n\n{conclusions(rows, refused[name])}" for name, rows in results.items()]
    text = (
        "# Attention replaced in trained diffusion models, without training\n\n"
        f"{pictures} pictures of each variant, from the same noise, in {steps} steps of DDIM; one of them is "
        f"{100 / pictures:g} points of accuracy. The classifier, which never saw a sample, is right on "
        f"{classifier_accuracy:.1f} % of the held-out real digits.\n\n"
        "- *attention*: its multiply-adds, with all that a variant adds to a step or saves in it, over those of the "
        "unpatched model's\n"
        "- *PSNR*, *features*: distance to the unpatched pictures, in pixels and (relative) in features\n"
        "- *accuracy*: pictures that the classifier takes for the class asked for\n"
        "- *Fréchet*: distance of the classifier's features to those of all real digits; it depends on the number of "
        "pictures, so rows compare, other reports do not\n"
        "- *speed*: over the unpatched model, in turns\n\n" + "\n\n".join(parts)
    )
    (root / "report.md").write_text(
        f"{text}\n\n## Quality over cost\n\n![curves](curves.png)\n\n## Pictures\n\n![pictures](grid.png)\n",
        encoding="utf-8",
    )
    print(f"\n{text}\n\nreport: {root / 'report.md'}")


def table(rows: Sequence[Result]) -> str:
    """Format the results of one model as a Markdown table."""
    lines = [
        "| variant | attention | PSNR | features | accuracy | Fréchet | s/step | speed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        same = row.psnr == MAX_PSNR
        lines.append(
            f"| {row.name} | {row.share:.1%} | {'same' if same else f'{row.psnr:.1f} dB'} | {row.features:.3f} | "
            f"{row.accuracy:.1f} % | {row.frechet:.2f} | {row.seconds:.3f} | {row.speed:.2f}× |"
        )
    return "\n".join(lines)


def conclusions(rows: Sequence[Result], refused: dict[str, str]) -> str:
    """List conclusions for one model: the uniform split, calibration and the rivals."""
    reasons = dict.fromkeys(refused.values())
    left_out = [f"Left out, {', '.join(n for n in refused if refused[n] == reason)}: {reason}." for reason in reasons]
    by_name = {row.name: row for row in rows}
    unpatched, uniform = by_name[UNPATCHED], by_name[UNIFORM]
    lines = [f"ELFATT's uniform split, at {uniform.share:.1%} of the multiply-adds: {_losses(uniform, unpatched)}."]
    if unpatched.accuracy < TRAINED:
        lines.insert(
            0, f"The unpatched model has only {unpatched.accuracy:.1f} %: train longer before comparing accuracy."
        )
    half = _closest(rows, HALF)
    if half is None:
        return _bullets([*lines, f"No calibrated plan is below {HALF:.0%}.", *left_out])
    gained = half.accuracy - uniform.accuracy, half.psnr - uniform.psnr
    lines.append(
        f"Calibration at up to {HALF:.0%} ({half.name}): {_losses(half, unpatched)}; over the uniform split "
        f"{gained[0]:+.1f} points and {gained[1]:+.1f} dB."
    )
    closer = []
    for rival in (row for row in rows if row.family in RIVALS):
        ours = _closest(rows, rival.share)
        if ours is None:
            lines.append(f"{rival.name}, {rival.share:.1%}, {rival.psnr:.1f} dB: no calibrated plan is as cheap.")
            closer.append(False)
            continue
        closer.append(ours.psnr > rival.psnr)
        lines.append(
            f"{rival.name}, {rival.share:.1%}: {rival.psnr:.1f} dB and {rival.accuracy:.1f} %; at no more cost "
            f"{ours.name} ({ours.share:.1%}) is {'closer' if closer[-1] else 'farther'}: {ours.psnr:.1f} dB and "
            f"{ours.accuracy:.1f} %."
        )
    kept = "reached" if unpatched.accuracy - half.accuracy <= POINT else "missed"
    lines += [*left_out, f"Goal, at most {POINT:g} point of accuracy lost at {HALF:.0%}: {kept}."]
    ahead = ("reached" if all(closer) else "missed") if closer else "no rival to compare with"
    return _bullets([*lines, f"Goal, closer than each rival at no more cost: {ahead}."])


def _losses(row: Result, unpatched: Result) -> str:
    return (
        f"accuracy {row.accuracy:.1f} % after {unpatched.accuracy:.1f} % ({row.accuracy - unpatched.accuracy:+.1f} "
        f"points), Fréchet {row.frechet:.2f} after {unpatched.frechet:.2f}, PSNR {row.psnr:.1f} dB"
    )


def _closest(rows: Sequence[Result], share: float) -> Result | None:
    """Return the calibrated plan with the highest PSNR at no more than a share of the cost."""
    found = [row for row in rows if row.family.startswith(CALIBRATED) and row.share <= share]
    return max(found, key=lambda row: row.psnr, default=None)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def draw_grid(results: dict[str, list[Result]], grids: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    """Draw a PNG with one row per variant, the same digits in each column, and models side by side."""
    names = list(dict.fromkeys(row.name for rows in results.values() for row in rows))
    found = {model: {row.name: row for row in rows} for model, rows in results.items()}
    digits = max(len(pictures) for grid in grids.values() for pictures in grid.values())
    size = (0.42 * digits * len(grids) + 3.2, 0.5 * len(names) + 0.4)
    figure, axes = plt.subplots(len(names), len(grids), figsize=size, squeeze=False, layout="constrained")
    for line, name in zip(axes, names, strict=True):
        for axis, (model, grid) in zip(line, grids.items(), strict=True):
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
            if name not in grid:
                continue
            strip = torch.cat([_pad(picture[0]) for picture in grid[name]], dim=1).numpy()
            axis.imshow(strip, cmap="gray_r", vmin=0, vmax=1, interpolation="bilinear")
            row = found[model][name]
            label = name if axis is line[0] else ""
            detail = "" if row.psnr == MAX_PSNR else f"{row.share:.0%} · {row.psnr:.1f} dB"
            axis.set_ylabel("\n".join(filter(None, (label, detail))), rotation=0, ha="right", va="center", size=8)
    for axis, model in zip(axes[0], grids, strict=True):
        axis.set_title(model, size=11)
    _save(figure, path)


def _pad(picture: torch.Tensor) -> torch.Tensor:
    """Pad an image ``[H, W]`` with a white column on each side."""
    return torch.nn.functional.pad(picture, (1, 1))


def draw_curves(results: dict[str, list[Result]], path: Path) -> None:
    """Plot PSNR, accuracy and Fréchet distance over attention's multiply-adds, with one row of panels per model."""
    panels = {"psnr": "PSNR to the unpatched, dB", "accuracy": "accuracy, %", "frechet": "Fréchet distance"}
    figure, axes = plt.subplots(len(results), len(panels), figsize=(12.5, 3.4 * len(results)), squeeze=False)
    families = list(dict.fromkeys(row.family for rows in results.values() for row in rows))
    colours = dict(zip(families, ["black", *plt.get_cmap("tab10").colors], strict=False))
    for line, (model, rows) in zip(axes, results.items(), strict=True):
        for axis, (key, title) in zip(line, panels.items(), strict=True):
            for family in families:
                points = sorted((100 * row.share, getattr(row, key)) for row in rows if row.family == family)
                if family == UNPATCHED and key != "psnr":
                    axis.axhline(points[0][1], color="black", ls="--", lw=1, label=family)
                elif points and family != UNPATCHED:
                    axis.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.2, color=colours[family], label=family)
            axis.set(title=f"{model}: {title}", xlabel="attention's multiply-adds, % of unpatched")
            axis.grid(alpha=0.3)
            if key == "frechet":
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 8), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
