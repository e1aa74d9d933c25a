"""Memory of a training step.

- ``estimate``: peak memory of a step, computed before it runs.
- ``available``: memory that this process can still use.
- ``out_of_memory``: detection and explanation of out-of-memory errors.
"""
