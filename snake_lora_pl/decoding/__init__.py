"""Greedy decoding of many sequences in lockstep. Knows nothing of Snake."""
