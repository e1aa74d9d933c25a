"""Python interface: a call that trains an adapter."""
