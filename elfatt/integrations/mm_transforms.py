"""Steps of the dense pipelines that read and check a user's files, registered in mmengine's root registry."""

from __future__ import annotations

import cv2
import numpy as np
from mmengine.registry import TRANSFORMS

from elfatt.data import UserError, check_shape, check_size, read_image
from elfatt.data.masks import check_labels, check_mask


@TRANSFORMS.register_module()
class LoadImage:
    """Reads an image as every program of this project does; takes the place of mmcv's ``LoadImageFromFile``.

    Args:
        mode: ``RGB``, which gives ``[H, W, 3]`` in mmcv's order BGR, or ``L``, grey ``[H, W]``; uint8.
    """

    def __init__(self, mode: str = "RGB"):
        if mode not in ("RGB", "L"):
            raise UserError(f"LoadImage(mode={mode!r})", "is no mode", "choose 'RGB' or 'L'")
        self.mode = mode

    def __call__(self, results: dict) -> dict:
        """Add ``img``, ``img_shape`` and ``ori_shape``, ``(H, W)`` both, to ``results`` with an ``img_path``.

        Raises:
            UserError: The file cannot be read, or is very flat.
        """
        path = results["img_path"]
        try:
            pixels = np.asarray(read_image(path, self.mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        height, width = pixels.shape[:2]
        check_shape(f"image {path}", (width, height))
        # many times faster than a copy of pixels[..., ::-1]
        results["img"] = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if self.mode == "RGB" else pixels.copy()
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


@TRANSFORMS.register_module()
class CheckMask:
    """Stops at a segmentation mask that does not belong to its image or to the classes, and says which file it is.

    Unchecked, a wrong size trains on shifted labels, and a wrong label is an assertion inside a CUDA kernel. Stands
    right behind ``LoadAnnotations``, before anything is resized.

    Args:
        num_classes: Labels are 0 to ``num_classes - 1``, after ``reduce_zero_label``.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.opened: set[str] = set()

    def __call__(self, results: dict) -> dict:
        """Pass ``results`` on as they are; an image without a mask passes as well.

        Raises:
            UserError: The mask has channels or 16 bits, another size than its image, or an unknown label, or is not
                loaded yet.
        """
        if "gt_seg_map" not in results:
            if results.get("seg_map_path") and results.get("seg_fields") == []:
                raise UserError("CheckMask", "stands before LoadAnnotations in the pipeline", "put it right behind")
            return results
        mask, path = results["gt_seg_map"], results["seg_map_path"]
        if path not in self.opened:  # once: Pillow decodes a PNG to look for EXIF data
            check_mask(path)  # mmseg has cut the labels to 8 bits
            self.opened.add(path)
        if mask.ndim != 2:  # mmseg squeezes
            raise UserError(f"mask {path}", "is one pixel wide or high", "remove it and its image")
        if mask.shape != tuple(results["ori_shape"]):
            check_size(results["img_path"], mask.shape[::-1], f"mask {path}")
        remedy = f"labels as trained are those of the {self.num_classes} classes: check the mask or num_classes"
        check_labels(path, mask, self.num_classes - 1, remedy)
        return results


@TRANSFORMS.register_module()
class CheckInstances:
    """Stops at an image that is not of the size that its annotation file says.

    Unchecked, a wrong width and height cut boxes off. Stands right before mmdet's ``LoadAnnotations``.
    """

    def __call__(self, results: dict) -> dict:
        """Pass ``results`` on as they are; an image without annotations passes as well.

        Raises:
            UserError: Another size, or the instances are loaded already.
        """
        if "gt_bboxes" in results:
            raise UserError("CheckInstances", "stands behind LoadAnnotations in the pipeline", "put it right before")
        height, width = results["ori_shape"]
        stated = results.get("width", width), results.get("height", height)
        if stated != (width, height):
            check_size(results["img_path"], stated, "its annotation file")
        return results
