"""Detection: programs over mmengine; see docs/segmentation_detection.md."""
