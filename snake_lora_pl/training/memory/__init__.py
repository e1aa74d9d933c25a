"""Memory of a training step: estimate, available memory, out-of-memory errors."""
