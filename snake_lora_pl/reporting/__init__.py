"""Reports of a run: HTML report, W&B, TensorBoard, tables and game files."""
