"""Exact resume: checkpoint I/O and the state that Lightning does not keep."""
