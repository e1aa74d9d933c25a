"""JSONL rows become batches. Importing this room is cheap; ``datamodule`` and ``batching`` import torch."""
