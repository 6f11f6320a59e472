"""What the step programs for a GPU and a TPU consist of, compiled where there is none."""
