"""Imitation on visited states: the adapter plays, a teacher names the move in each state, and these states are trained.

The method is DAgger (Ross, Gordon & Bagnell, 2011, https://arxiv.org/abs/1011.0686):

- ``visits``: plays the games of a round and assesses each state;
- ``rows``: the rows of a round and their file;
- ``mixing``: replaces a share of each training batch by rows of the rounds;
- ``callback``: plays a round every few optimizer steps, and resumes exactly.
"""
