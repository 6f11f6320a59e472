"""Methods compared on one pair of networks; see `__main__`."""
