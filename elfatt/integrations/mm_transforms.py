"""Pipeline steps that read and check a user's files, registered in mmengine's root registry."""

from __future__ import annotations

import os

import cv2
import numpy as np
from mmengine.registry import TRANSFORMS

from elfatt.data import UserError, check_shape, check_size, read_image
from elfatt.data.masks import check_labels, check_mask
from elfatt.suggest import other_form


@TRANSFORMS.register_module()
class LoadImage:
    """Read an image with ``elfatt.data.read_image``; replaces mmcv's ``LoadImageFromFile``.

    Args:
        mode: ``RGB`` for ``[H, W, 3]`` in mmcv's BGR order, or ``L`` for greyscale ``[H, W]``; uint8.
    """

    def __init__(self, mode: str = "RGB"):
        if mode not in ("RGB", "L"):
            raise UserError(f"LoadImage(mode={mode!r})", "is not a mode", "use 'RGB' or 'L'")
        self.mode = mode

    def __call__(self, results: dict) -> dict:
        """Read ``img_path``, adding ``img``, and ``img_shape`` and ``ori_shape`` as ``(H, W)``.

        Raises:
            UserError: The file cannot be read, or the aspect ratio is too extreme.
        """
        path = results["img_path"]
        try:
            pixels = np.asarray(read_image(path, self.mode))
        except UserError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            fault = getattr(error, "strerror", None) or str(error)
            folder, name = os.path.split(path)
            if isinstance(error, FileNotFoundError) and os.path.isdir(folder):
                fault += other_form(name, os.listdir(folder))
            raise UserError(f"image {path} cannot be read: {fault}") from error
        height, width = pixels.shape[:2]
        check_shape(f"image {path}", (width, height))
        # many times faster than a copy of pixels[..., ::-1]
        results["img"] = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if self.mode == "RGB" else pixels.copy()
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


@TRANSFORMS.register_module()
class CheckMask:
    """Check that a segmentation mask matches its image and the classes.

    Otherwise a wrong size would train on shifted labels, and a wrong label would fail an assertion in a CUDA kernel.
    Place it directly after ``LoadAnnotations``, before any resizing.

    Args:
        num_classes: Labels are 0 to ``num_classes - 1``, after ``reduce_zero_label``.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.opened: set[str] = set()

    def __call__(self, results: dict) -> dict:
        """Return ``results`` unchanged, also for an image without a mask.

        Raises:
            UserError: The mask has channels, 16 bits, the wrong size or an unknown label, or is not loaded yet.
        """
        if "gt_seg_map" not in results:
            if results.get("seg_map_path") and results.get("seg_fields") == []:
                raise UserError("CheckMask", "comes before LoadAnnotations in the pipeline", "move it directly after")
            return results
        mask, path = results["gt_seg_map"], results["seg_map_path"]
        if path not in self.opened:  # only once: Pillow decodes a PNG to look for EXIF data
            check_mask(path)  # the file, as mmseg truncates labels to 8 bits
            self.opened.add(path)
        if mask.ndim != 2:  # squeezed by mmseg
            raise UserError(f"mask {path}", "is one pixel wide or high", "remove it and its image")
        if mask.shape != tuple(results["ori_shape"]):
            check_size(results["img_path"], mask.shape[::-1], f"mask {path}")
        remedy = f"training labels must be those of the {self.num_classes} classes: check the mask or num_classes"
        check_labels(path, mask, self.num_classes - 1, remedy)
        return results


@TRANSFORMS.register_module()
class CheckInstances:
    """Check that an image has the size stated in its annotation file.

    Otherwise boxes would be clipped. Place it directly before mmdet's ``LoadAnnotations``.
    """

    def __call__(self, results: dict) -> dict:
        """Return ``results`` unchanged, also for an image without annotations.

        Raises:
            UserError: The size differs, or the instances are already loaded.
        """
        if "gt_bboxes" in results:
            raise UserError("CheckInstances", "comes after LoadAnnotations in the pipeline", "move it directly before")
        height, width = results["ori_shape"]
        stated = results.get("width", width), results.get("height", height)
        if stated != (width, height):
            check_size(results["img_path"], stated, "its annotation file")
        return results
