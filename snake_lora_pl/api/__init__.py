"""Python interface: a call that trains an adapter, and a call that loads one as a player."""
