"""Greedy decoding of many sequences in lockstep; independent of Snake."""
