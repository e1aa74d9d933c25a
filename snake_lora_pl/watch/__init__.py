"""A local web page on which a player plays one game: its text, its probabilities, and the teacher's move."""
