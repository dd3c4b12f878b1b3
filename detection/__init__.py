"""Detection programs based on mmengine; see docs/segmentation_detection.md."""
