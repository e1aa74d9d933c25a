"""Exact resume: a run resumed from a checkpoint gives the same weights and metrics as an uninterrupted run, bit by bit.

- ``checkpoint_io``: how checkpoint files are written and read.
- ``checkpoint_state``: state that Lightning does not save, and corrections of its loop counters.
- ``random_state``: random number generators of all ranks.

The data position is restored elsewhere: ``SnakeJSONLDataModule.state_dict`` saves it, ``load_state_dict`` restores it,
and the sampler of ``snake_lora_pl.data`` skips the rows before it. ``AdapterCheckpoint`` decides when a checkpoint is
written: always between two optimizer steps.
"""
