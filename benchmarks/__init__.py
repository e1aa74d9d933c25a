"""Side-by-side runs against peers, which need the extra ``bench``, and the players that ours are measured by."""
