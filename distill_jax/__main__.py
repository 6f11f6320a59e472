"""`python -m distill_jax`."""

from distill_jax.main import run

run()
