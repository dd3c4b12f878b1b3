"""Draws the segmentation of an image file: ``python segmentation/inference.py CONFIG CHECKPOINT IMAGE OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from elfatt.data import read_image  # noqa: E402
from elfatt.integrations import mm_errors, mm_runner  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Runs the program with these arguments, by default the command line's."""
    args = mm_runner.parse_inference(argv, "segmentation")
    from mmseg.apis import inference_model, init_model, show_result_pyplot

    model = mm_runner.load_model(args, init_model)
    result = inference_model(model, args.image)
    show_result_pyplot(
        model, np.asarray(read_image(args.image)), result, draw_gt=False, show=False, out_file=args.output
    )


if __name__ == "__main__":
    mm_errors.run(main)
