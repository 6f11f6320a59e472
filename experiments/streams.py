"""How fast streamed images come, in threads and by worker processes, and that they are the same.

  python -m experiments.streams --json=experiments/results/streams.json

Makes up a set of ImageNet's shape and form (1,000 classes, JPEGs of many sizes, as TFDS prepares
them) in a temporary folder. Prints how many images a second training is given, and what
`configs/teskd_imagenet_resnet18.py` with a small network ends with in one process and in two, with
worker processes and without.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from distill_jax import data
from distill_jax.data import streamed
from experiments.benchmark import machine

CLASSES = 1000
BATCH = 64
# Which part of the published pictures has its longer side, and which ratio of the sides.
SIDES, OF_SIDE = (500, 640, 400, 333, 1024), (0.7, 0.1, 0.1, 0.05, 0.05)
RATIOS = (0.75, 0.667, 0.8, 1.0)
CONFIG = "configs/teskd_imagenet_resnet18.py"
PLENTY = (1, 4, 16, 64)  # threads, where cores are plenty


# ------------------------------------------------------------------------------------ made-up set
def jpeg(number: int) -> bytes:
    """A picture with coarse colours and fine noise, about as many bytes as a photograph."""
    from PIL import Image

    rng = np.random.default_rng((7, number))
    long = int(rng.choice(SIDES, p=OF_SIDE))
    size = [long, int(long * rng.choice(RATIOS))]
    width, height = size if rng.random() < 0.75 else size[::-1]
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((width, height))
    noise = rng.integers(0, 256, (height // 2, width // 2), np.uint8)
    fine = np.asarray(Image.fromarray(noise).resize((width, height)), np.int16)[..., None]
    pixels = np.clip(np.asarray(coarse, np.int16) + (fine - 128) // 3, 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=(92, 85, 85)[number % 3])
    return file.getvalue()


def make(folder: str, train: int, test: int) -> None:
    """Writes what `tfds build imagenet2012 --file_format=array_record` would, made up."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=CLASSES),
        "file_name": tfds.features.Text(),
    }

    def info(builder):
        form = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(
            builder=builder, features=form, supervised_keys=("image", "label")
        )

    def examples(builder, numbers):
        for i in numbers:
            example = {"label": i % CLASSES, "file_name": f"{i}.JPEG"}
            yield i, {"image": io.BytesIO(jpeg(i)), **example}

    def splits(builder, manager):
        parts = {"train": range(train), "validation": range(train, train + test)}
        return {name: examples(builder, numbers) for name, numbers in parts.items()}

    with tfds.core.registered.skip_registration():
        members = {
            "VERSION": tfds.core.Version("5.1.0"),
            "_info": info,
            "_split_generators": splits,
            "_generate_examples": examples,
        }
        builder = type("Imagenet2012", (tfds.core.GeneratorBasedBuilder,), members)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()


# -------------------------------------------------------------------------------------- how fast
@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Has this process decode in so many threads."""
    with ThreadPoolExecutor(number) as pool, mock.patch.object(streamed, "_threads", lambda: pool):
        yield


def rate(images: data.Streamed, workers: int, count: int) -> dict[str, float]:
    """What training is given: images a second, and a second of one core.

    Args:
      images: the training images.
      workers: processes; 0 decodes in the threads of this one.
      count: images that are timed; those of the first two steps come before.
    """
    start = time.perf_counter()
    reading = data.Reading(images, BATCH, seed=0, epochs=2)
    split = data.at_epoch(data.Split(images, np.zeros(len(images), int)), 0, 0)
    order, _ = data.epoch_order(len(images), BATCH, seed=0, epoch=0)
    with contextlib.ExitStack() as stack:
        read = None
        if workers:
            read = stack.enter_context(contextlib.closing(data.Workers(reading, workers))).read
        with mock.patch.object(streamed, "CHUNK_BYTES", 0):  # a step in each
            chunks = data.chunks(split, order, read=read)
            next(chunks), next(chunks)
            begun, used = time.perf_counter(), _cpu_seconds()
            for _ in range(count // BATCH):
                next(chunks)
            passed, used = time.perf_counter() - begun, _cpu_seconds() - used
            chunks.close()
    done = count // BATCH * BATCH
    return {
        "images_per_second": done / passed,
        "images_per_core_second": done / used,
        "cores": used / passed,
        "seconds_to_begin": begun - start,
    }


def _cpu_seconds() -> float:
    """That this process has used, and those that it started."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def with_plenty_of_cores(images: data.Streamed, seconds: float, count: int) -> dict[int, float]:
    """Images a second that threads of one process can come to where each has a core for itself.

    Decoding and resizing, which run beside other threads, are slept through instead for as long as
    a picture takes. What is left takes its turn, as Python code does: its seconds of one core.
    """
    from PIL import Image, JpegImagePlugin

    made = Image.fromarray(np.zeros((images.side, images.side, 3), np.uint8))

    def load(image):
        time.sleep(seconds / 2)

    def resize(image, *arguments, **named):
        time.sleep(seconds / 2)
        return made

    faked = {"load": load, "resize": resize, "crop": lambda image, box: image}
    split = data.at_epoch(data.Split(images[:count], np.zeros(count, int)), 0, 0)
    out, found = np.empty(split.images.shape, np.uint8), {}
    with mock.patch.multiple(JpegImagePlugin.JpegImageFile, **faked):
        for number in PLENTY:
            with threads(number):
                split.images[:BATCH].read(out[:BATCH])
                begun = time.process_time()
                split.images.read(out)
                found[number] = count / (time.process_time() - begun)
    return found


def rates(images: data.Streamed, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """The medians of `rate` over rounds in turns: in one thread and in two, by workers."""
    ways = {"1 thread": (1, 0), "2 threads": (2, 0), "1 worker": (1, 1), "2 workers": (1, 2)}
    every: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (inside, workers) in ways.items():
            with threads(inside):
                every[name].append(rate(images, workers, count))
    return {
        name: {key: statistics.median(one[key] for one in lines) for key in lines[0]}
        for name, lines in every.items()
    }


# -------------------------------------------------------------------------------------- the same
def trained(folder: str, workdir: Path, processes: int, workers: int, smoke: bool) -> str:
    """The digest of what the config ends with, as processes on two CPU devices together."""
    small = "plane2" if smoke else "resnet8"
    command = [
        *(sys.executable, "-m", "distill_jax", "train", f"--config={CONFIG}"),
        *(f"--config.dataset.data_dir={folder}", f"--workdir={workdir}", "--log=json"),
        *(f"--config.networks={small}", f"--config.students={small}", "--config.selection=last"),
        *("--config.dataset.valid_fraction=0.0", "--config.recipe.epochs=1"),
        *("--config.recipe.batch_size=64", "--config.recipe.train_limit=1"),
        *("--config.dtype=float32", "--config.devices=2", f"--config.workers={workers}"),
    ]
    with contextlib.closing(socket.socket()) as one:
        one.bind(("localhost", 0))
        address = f"localhost:{one.getsockname()[1]}"
    several = [
        [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"]
        for i in range(processes)
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["JAX_NUM_CPU_DEVICES"] = str(2 // processes)
    started = [
        subprocess.Popen(
            [*command, *(own if processes > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in several
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(said))
    (row,) = json.loads((workdir / "results.json").read_text())
    return row["state_digest"]


def main(argv: Sequence[str]) -> int:
    """Measures, trains, and prints two tables."""
    parser = argparse.ArgumentParser(prog="experiments.streams", description=__doc__)
    parser.add_argument("--json", help="file for all numbers; a part that is there stays")
    parser.add_argument("--images", type=int, default=3000, help="of the made-up training set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("rates", "same"), help="one of the two parts")
    parser.add_argument("--smoke", action="store_true", help="in miniature")
    given = parser.parse_args(argv)
    if given.json and not Path(given.json).parent.is_dir():
        parser.error(f"--json={given.json}: there is no folder {Path(given.json).parent}")
    about, console = machine.describe([]), Console(width=120, highlight=False)
    found: dict[str, Any] = {}
    if given.json and Path(given.json).exists():  # the other part
        found = json.loads(Path(given.json).read_text())
    found["machine"] = about
    with tempfile.TemporaryDirectory() as folder:
        train = 1024 if given.smoke else given.images
        make(folder, train, 64 if given.smoke else 250)
        dataset = data.load("tfds:imagenet2012", data_dir=folder, valid_fraction=0.0)
        images = dataset.train.images
        sizes = [len(images.source[i]) for i in range(200)]
        found["set"] = {"images": train, "classes": CLASSES, "mean_bytes": int(np.mean(sizes))}
        console.print(machine.one_line(about))
        if busy := machine.busy(about):
            console.print(busy)
        if given.only != "same":
            count = BATCH if given.smoke else 8 * BATCH
            found["rates"] = rates(images, 1 if given.smoke else given.rounds, count)
            table = Table("decoded in", "images/s", "images/s a core", "cores", "s to begin")
            for name, line in found["rates"].items():
                shown = (f"{line[key]:.1f}" for key in line)
                table.add_row(name, *shown)
            console.print(table)
            seconds = 1 / found["rates"]["1 thread"]["images_per_core_second"]
            plenty = with_plenty_of_cores(images, seconds, count)
            found["plenty_of_cores"] = plenty
            told = ", ".join(f"{n}: {value:.0f}" for n, value in plenty.items())
            console.print(f"at most, in so many threads of one process, images/s: {told}")
        if given.only != "rates":
            found["digests"] = {
                f"{processes} processes, {workers} workers": trained(
                    folder, Path(folder, f"{processes}-{workers}"), processes, workers, given.smoke
                )
                for processes, workers in ((1, 0), (2, 0), (1, 2), (2, 1))
            }
            table = Table("trained as", "digest of the parameters")
            for name, digest in found["digests"].items():
                table.add_row(name, digest)
            console.print(table)
            same = len(set(found["digests"].values())) == 1
            console.print("the same bytes" if same else "NOT the same bytes")
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
