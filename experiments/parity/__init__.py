"""Compares this library with outputs of the authors' PyTorch code."""
