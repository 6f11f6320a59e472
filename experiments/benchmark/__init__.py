"""The benchmark: variants of a step, each in a process of its own, measured in turns."""
