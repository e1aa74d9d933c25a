"""One optimization step of an adapter, and its callbacks. Knows nothing of Snake and reads no rows."""
