"""Data pipeline: JSONL rows are read, encoded, cached, split and batched.

Importing this package is cheap: only ``datamodule``, ``loaders``, ``samplers`` and ``batching`` import torch.
"""
