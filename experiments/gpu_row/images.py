"""Unpacks a half of CIFAR-10 into its share of the published binary layout.

  python -m experiments.gpu_row.images cifar10_a.npz DIR

A half is an .npz of lossless pictures, each of 10x10 images: `blob`, the files one after the other;
`sizes`, how long each is; `labels`; and `meta`, a JSON object with `part`, "a" or "b". The first
holds images 0 to 29999, the second the rest, of which the last 10000 are for testing. Once both
are unpacked into a folder it is one for --data_dir. Needs Pillow.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "cifar-10-batches-bin"
FILES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
EACH, SIDE = 10_000, 10  # images of a file; of a side of a picture


def records(file: str | Path) -> tuple[int, np.ndarray]:
    """Which half a file holds, 0 or 1, and its images: (N, 3073) uint8, the label and three planes.

    Raises:
      ValueError: the file is not such a half.
    """
    with np.load(file) as stored:
        if missing := {"blob", "sizes", "labels", "meta"} - set(stored.files):
            raise ValueError(
                f"{file} has no {', '.join(sorted(missing))}: expected half a data set"
            )
        blob, ends = stored["blob"].tobytes(), np.cumsum(stored["sizes"])
        labels, meta = stored["labels"], json.loads(str(stored["meta"]))
    pictures = [
        np.asarray(Image.open(io.BytesIO(blob[end - size : end])).convert("RGB"))
        for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)
    ]
    tiles = np.stack(pictures).reshape(-1, SIDE, 32, SIDE, 32, 3)
    planes = tiles.transpose(0, 1, 3, 5, 2, 4).reshape(len(labels), -1)
    return "ab".index(meta["part"]), np.concatenate([labels[:, None], planes], 1)


def unpack(file: str | Path, data_dir: str | Path) -> list[str]:
    """Writes the files of a half; the names of those that the folder still lacks.

    Raises:
      ValueError: the file is not such a half.
    """
    half, rows = records(file)
    folder = Path(data_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for i, batch in enumerate(np.split(rows, range(EACH, len(rows), EACH))):
        batch.tofile(folder / FILES[half * len(FILES) // 2 + i])
    return [name for name in FILES if not (folder / name).exists()]


def main(argv: list[str]) -> int:
    """Unpacks a file into a folder."""
    if len(argv) != 2:
        print(f"error: {len(argv)} arguments: expected FILE DIR", file=sys.stderr)
        return 1
    try:
        missing = unpack(*argv)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{argv[1]}: " + (f"still lacks {', '.join(missing)}" if missing else "is complete"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
