"""Trains on streamed images, as one of several processes where it is told so.

python streaming.py DEVICES WORKERS [ADDRESS NUMBER PLACE]; prints as JSON what came out and what
was read.
"""

import json
import os
import sys

devices, workers, *joined = sys.argv[1:]
flag = f"--xla_force_host_platform_device_count={devices}"
os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {flag}"

import jax  # noqa: E402
import numpy as np  # noqa: E402

import distill_jax  # noqa: E402
from distill_jax import data, processes  # noqa: E402
from distill_jax.data import streamed  # noqa: E402

SIDE, BATCH = 16, 8
streamed.SIZE, streamed.MARGIN = SIDE, 4


class Records:
    """Pictures by their number, of which it notes those that are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 40

    def __getitem__(self, i):
        self.read.append(i)
        rng = np.random.default_rng(i)
        return rng.integers(0, 256, (20 + i % 9, 34 - i % 7, 3), np.uint8)


def main():
    if joined:
        address, number, place = joined
        jax.distributed.initialize(address, int(number), int(place))
    # two steps of this process in a chunk
    share = BATCH // (int(joined[1]) if joined else 1)
    streamed.CHUNK_BYTES = 2 * share * SIDE * SIDE * 3
    train, test = Records(), Records()
    splits = (
        (streamed.Streamed(records, name, np.arange(40)), np.arange(40) % 4)
        for name, records in (("train", train), ("test", test))
    )
    dataset = data.from_arrays(*splits, classes=4, name="tiny", valid_fraction=0.0)
    recipe = {"epochs": 2, "batch_size": BATCH, "augment": "flip", "last_batch": "keep"}
    config = {"networks": ("plane2",), "guidance": ("none",), "devices": 0, "recipe": recipe}
    config |= {"selection": "last", "workers": int(workers)}
    results = distill_jax.run(config, dataset=dataset, progress=False)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in results.rows]
    print("RESULT", json.dumps({"rows": rows, "read": train.read}))
    processes.leave(0)


if __name__ == "__main__":  # its workers import it too
    main()
