"""Side-by-side runs against peers. Needs the extra ``bench``."""
