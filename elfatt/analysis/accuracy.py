"""Evaluate checkpoints with the task folders' programs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from elfatt.analysis.rows import CONFIGS, Row
from elfatt.ops import active_backend

SUFFIXES = (".pth", ".pth.tar", ".pt", ".safetensors")
PROGRAMS = {  # in a checkout's task folders, run as subprocesses
    "classification": "classification.validate",
    "segmentation": "segmentation.test",
    "detection": "detection.test",
}
METRICS = {  # the program's metric: column of the published tables
    "classification": {"top1": "top1_percent"},
    "segmentation": {"mIoU": "miou_percent", "mAcc": "macc_percent"},
    "detection": {
        f"coco/{kind}_mAP{suffix}": f"ap{suffix.strip('_')}_{name}"
        for kind, name in (("bbox", "box"), ("segm", "mask"))
        for suffix in ("", "_50", "_75")
    },
}


def evaluate(row: Row, checkpoints: Path, data: dict[str, Path | None], device: str) -> dict[str, float | str]:
    """Return a row's metrics in percent by table column, and the checkpoint's file name.

    Empty if the checkpoint or the dataset is missing.

    Args:
        row: Row that determines the config and the checkpoint's name.
        checkpoints: Folder of checkpoints.
        data: Dataset folder of each task.
        device: ``cpu`` or ``cuda``.

    Raises:
        RuntimeError: The program failed; the message contains its last line.
    """
    task = {6: "detection", 7: "segmentation"}.get(row.table, "classification")
    files = [checkpoints.resolve() / (row.config + suffix) for suffix in SUFFIXES]
    checkpoint = next((file for file in files if file.is_file()), None)
    root = data[task]
    if checkpoint is None or root is None or row.is_edge:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        if task == "classification":
            command = [*row.config_arguments(), "--checkpoint", checkpoint]
            command += ["--device", device, "--results-file", Path(folder) / "metrics.json"]
        else:
            command = [CONFIGS / task / f"{row.config}.py", checkpoint, "--work-dir", folder]
        command = [
            sys.executable,
            "-m",
            PROGRAMS[task],
            *command,
            "--data-dir",
            root.resolve(),
            "--backend",
            active_backend(),
        ]
        print(f"accuracy: {row.name}: {checkpoint}", file=sys.stderr)
        done = subprocess.run([str(part) for part in command], cwd=CONFIGS.parent, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{command[2]} failed on {checkpoint}: {last}")
        (file,) = Path(folder).rglob("*.json") if task == "classification" else Path(folder).glob("*/*.json")
        found = json.loads(file.read_text())
    scale = 100 if task == "detection" else 1
    return {"checkpoint": checkpoint.name} | {column: scale * found[metric] for metric, column in METRICS[task].items()}
