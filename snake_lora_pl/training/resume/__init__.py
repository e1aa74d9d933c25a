"""Exact resume: a resumed run has the same weights and metrics as an uninterrupted run, bit by bit.

``AdapterCheckpoint`` (in ``training/callbacks``) writes every checkpoint between two optimizer steps. This package has

- ``checkpoint_io``: checkpoint files, written atomically and read without running pickled code;
- ``checkpoint_state``: the state that Lightning does not save, and corrections of its loop counters;
- ``random_state``: the random number generators of all ranks.

The data position is restored by ``snake_lora_pl/data/resume.py``, from Lightning's batch counter in the checkpoint.
"""
