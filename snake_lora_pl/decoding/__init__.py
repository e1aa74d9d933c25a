"""Greedy decoding of many prompts, in lockstep or with ``generate``; independent of Snake."""
