"""Weights from and to other worlds."""
