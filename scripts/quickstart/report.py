"""Write the quickstart's report: tables, training curves, and predictions on held-out digits and scenes."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torchvision.datasets import ImageFolder

import elfatt  # noqa: F401  registers the models
from elfatt.checkpoints import load_checkpoint
from elfatt.console import replace_unprintable
from scripts.quickstart import dense

SAMPLES = 40
COLUMNS = 10
GOAL = 97.0
DENSE_GOALS = {  # metric: (display name, goal in %)
    "segmentation": {"mIoU": ("UperNet, mIoU", 75)},
    "detection": {
        "coco/bbox_mAP_50": ("Mask R-CNN, box AP50", 70),
        "coco/segm_mAP_50": ("Mask R-CNN, mask AP50", 65),
    },
}


def main() -> None:
    """Read the finished runs and write report.md and its figures."""
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the quickstart's runs")
    parser.add_argument("--digits", type=Path, required=True, help="folder written by digits.py")
    parser.add_argument("--scenes", type=Path, required=True, help="folder written by scenes.py")
    args = parser.parse_args()
    run = args.root / "digits"
    result = json.loads((run / "validate.json").read_text())
    with (run / "summary.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    draw_curves(history, args.root / "curves.png")
    wrong = draw_predictions(run, result["model"], args.digits / "val", args.root / "predictions.png")
    scores = {}
    for task, draw in (("segmentation", dense.draw_segmentation), ("detection", dense.draw_detection)):
        checkpoint, scores[task] = dense.evaluate(task, args.root / task, args.scenes)
        draw(checkpoint, args.scenes, args.root / f"{task}.png")
    text = f"{table(result, wrong, len(history))}\n\n{dense_table(scores)}"
    (args.root / "report.md").write_text(
        f"# Quickstart\n\n{text}\n\n## Training of the classifier\n\n![training curves](curves.png)\n\n"
        "## Held-out digits\n\nAll mistakes first, then correct ones; the title is the prediction, "
        "in red with the truth where it is wrong.\n\n![predictions](predictions.png)\n\n"
        "## Held-out scenes\n\nUperNet:\n\n![segmentation](segmentation.png)\n\n"
        f"Mask R-CNN, instances with a score of at least {dense.CONFIDENT:.0%}:\n\n![detection](detection.png)\n"
    )
    print(f"\n{text}\n\nreport: {args.root / 'report.md'}")


def dense_table(scores: dict[str, dict[str, float]]) -> str:
    """Format the metrics of the dense models on held-out scenes as a Markdown table."""
    rows = []
    for task, goals in DENSE_GOALS.items():
        for key, (name, goal) in goals.items():
            percent = scores[task][key] * (100 if key.startswith("coco/") else 1)  # mmseg reports %, mmdet fractions
            rows.append(f"| {name} | {percent:.1f} % (goal {goal} %) |")
    return "\n".join(["| Held-out scenes | |", "|---|---|", *rows])


def table(result: dict, wrong: int, epochs: int) -> str:
    """Format the classification results as a Markdown table."""
    images = result["images"]
    rows = [
        ("model", result["model"]),
        ("data", f"scikit-learn digits, {images} held out"),
        ("epochs", epochs),
        ("weights", "averaged (EMA)" if result["weights"] == "ema" else "raw"),
        ("top-1", f"{result['top1']:.2f} % ({wrong} of {images} wrong; goal {GOAL:.0f} %)"),
        ("top-5", f"{result['top5']:.2f} %"),
        ("loss", f"{result['loss']:.4f}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def draw_curves(history: list[dict[str, str]], path: Path) -> None:
    """Plot loss, top-1 error of raw and EMA weights, and learning rate by epoch."""
    epochs = [int(row["epoch"]) + 1 for row in history]
    panels = {
        "loss": {"training": "train_loss", "held out, averaged": "eval_ema_loss"},
        "top-1 error in %": {"raw weights": "eval_raw_top1", "averaged weights": "eval_ema_top1"},
        "learning rate": {"": "lr"},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.2), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, column in lines.items():
            values = [float(row[column]) for row in history]
            axis.plot(epochs, [100 - v for v in values] if "error" in title else values, label=label)
        axis.set(title=title, xlabel="epoch")
        if "error" in title:
            axis.set_yscale("symlog", linthresh=1)
        if len(lines) > 1:
            axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_predictions(run: Path, name: str, folder: Path, path: Path) -> int:
    """Draw held-out images with their predictions, mistakes first, and return the number of mistakes."""
    saved = torch.load(run / "last.pth.tar", map_location="cpu", weights_only=True)["args"]
    model = timm.create_model(
        name, num_classes=saved["num_classes"], img_size=saved["img_size"], **saved["model_kwargs"]
    ).eval()
    load_checkpoint(model, run / "last.pth.tar")
    size = (3, saved["img_size"], saved["img_size"])
    config = resolve_model_data_config(model) | {"input_size": size, "crop_pct": saved["crop_pct"]}
    held_out = ImageFolder(folder, transform=create_transform(**config))
    images, labels = zip(*held_out, strict=True)
    with torch.inference_mode():
        confidence, predicted = model(torch.stack(images)).softmax(-1).max(-1)
    wrong = predicted != torch.tensor(labels)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    shown = sorted(shuffled, key=lambda i: not wrong[i])

    figure, axes = plt.subplots(SAMPLES // COLUMNS, COLUMNS, figsize=(12, 5.6), layout="constrained")
    for axis, i in zip(axes.flat, shown, strict=False):
        axis.imshow(held_out.loader(held_out.samples[i][0]))
        label = f"{predicted[i]} ({confidence[i]:.0%})"
        axis.set_title(f"{label}, is {labels[i]}" if wrong[i] else label, color="red" if wrong[i] else "black", size=9)
        axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return int(wrong.sum())


if __name__ == "__main__":
    main()
