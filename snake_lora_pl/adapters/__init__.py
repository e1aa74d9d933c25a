"""Adapters on base models, in memory and on disk. Knows nothing of data, training or Snake."""
