"""From a config to results: the plan, its stages, and what is kept of them."""
