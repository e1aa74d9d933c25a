"""Training of an adapter on a causal language model. Knows nothing of Snake and reads no files of rows."""
