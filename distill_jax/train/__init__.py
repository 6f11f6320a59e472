"""One stage, from its first step to its best weights."""
