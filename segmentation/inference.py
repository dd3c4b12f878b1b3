"""Draw the segmentation of an image: ``python -m segmentation.inference CONFIG CHECKPOINT IMAGE OUTPUT``."""

from __future__ import annotations

import numpy as np

from elfatt.data import read_image
from elfatt.integrations import mm_errors, mm_runner


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    args = mm_runner.parse_inference(argv, "segmentation")
    from mmseg.apis import inference_model, init_model, show_result_pyplot

    model = mm_runner.load_model(args, init_model)
    result = inference_model(model, args.image)
    show_result_pyplot(
        model, np.asarray(read_image(args.image)), result, draw_gt=False, show=False, out_file=args.output
    )


if __name__ == "__main__":
    mm_errors.run(main)
