"""What a Python program calls, over all other rooms: one call that trains, one that makes a player of what came out."""
