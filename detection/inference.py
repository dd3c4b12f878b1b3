"""Draw the instances in an image: ``python -m detection.inference CONFIG CHECKPOINT IMAGE OUTPUT``."""

from __future__ import annotations

import numpy as np

from elfatt.data import read_image
from elfatt.integrations import mm_errors, mm_runner


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    args = mm_runner.parse_inference(argv, "detection")
    from mmdet.apis import inference_detector, init_detector
    from mmdet.visualization import DetLocalVisualizer

    model = mm_runner.load_model(args, init_detector)
    result = inference_detector(model, args.image)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = model.dataset_meta
    image = np.asarray(read_image(args.image))
    visualizer.add_datasample("image", image, result, draw_gt=False, pred_score_thr=args.score, out_file=args.output)


if __name__ == "__main__":
    mm_errors.run(main)
