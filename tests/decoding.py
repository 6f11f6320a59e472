"""Trains without end on images that two worker processes decode; prints which these are."""

import multiprocessing

import numpy as np

import distill_jax
from distill_jax import data


class Told(distill_jax.train.reporter.Reporter):
    """Prints the workers once, when each has decoded for some steps."""

    def __init__(self):
        self.told = False

    def progress(self, step, images_per_second):
        if step >= 4 and not self.told:
            print(*(one.pid for one in multiprocessing.active_children()), flush=True)
            self.told = True


def main():
    pictures = [np.full((20, 20, 3), i, np.uint8) for i in range(16)]
    images = data.Streamed(pictures, "gray", np.arange(16), side=16, margin=4)
    pair = images, np.arange(16) % 4
    dataset = data.from_arrays(pair, pair, classes=4, name="tiny", valid_fraction=0.0)
    config = {
        "networks": ("plane2",),
        "guidance": ("none",),
        "selection": "last",
        "workers": 2,
        "recipe": {"epochs": 10**6, "batch_size": 8},
    }
    results = distill_jax.run(config, dataset=dataset, reporter=Told())
    print("interrupted", results.interrupted)


if __name__ == "__main__":
    main()
