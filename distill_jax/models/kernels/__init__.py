"""Convolutions, pools and BatchNorm: how they are computed, hidden from the networks."""
