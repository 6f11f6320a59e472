"""Hyperparameters chosen on the validation split; see `__main__`."""
