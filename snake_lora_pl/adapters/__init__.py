"""What is trained on top of a base model, and its life on disk. Knows nothing of data, training or Snake."""
