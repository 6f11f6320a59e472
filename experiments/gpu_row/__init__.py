"""What a GPU is asked once: steps, populations, same bytes, starts, parity, and the whole row."""
