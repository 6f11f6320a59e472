"""Where published files are looked for, and how they are read without trusting them."""

import gzip
import os
import pathlib
import tarfile
import zlib
from collections.abc import Collection
from typing import IO, cast

from distill_jax.data.checks import DataError

# Well above every published file read here; below it a damaged header cannot ask for the moon.
_MAX_BYTES = 2**30
_DAMAGE = (EOFError, OSError, zlib.error, tarfile.TarError, ValueError)


def folders(data_dir: str, *usual: str) -> list[pathlib.Path]:
    """Folders to search: `data_dir` alone where it is given, else the usual places.

    The usual places: $DISTILL_JAX_DATA, ~/.cache/distill_jax, `usual`. A folder that was asked for
    and holds nothing is a mistake worth hearing of, so it is not passed over for another one.
    """
    if data_dir:
        path = pathlib.Path(data_dir).expanduser()
        if not path.is_dir():
            raise DataError(f"data_dir is {data_dir!r}: expected an existing folder")
        return [path]
    places = [os.environ.get("DISTILL_JAX_DATA", ""), "~/.cache/distill_jax", *usual]
    return [pathlib.Path(place).expanduser() for place in places if place]


def within(data_dir: str, kind: str, detail: str, expected: str) -> pathlib.Path:
    """The file or folder `detail` of a data set "KIND:DETAIL", within `data_dir` where it is given.

    Raises:
      DataError: there is none; says what was expected.
    """
    path = pathlib.Path(data_dir).expanduser() / pathlib.Path(detail).expanduser()
    if not detail or not path.exists():
        raise DataError(f"{kind}:{detail} is at {path}, where nothing is: expected {expected}")
    return path


def read_text(path: pathlib.Path) -> str:
    """The text of a UTF-8 file without its byte order mark; DataError where it is none."""
    try:
        return read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 ({error}): expected text") from error


def read(path: pathlib.Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz; DataError where it is damaged."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if len(raw) > _MAX_BYTES:
        raise DataError(f"{path} holds over {_MAX_BYTES} bytes: expected the published file")
    return raw


class _Bounded:
    """The start of a stream; DataError beyond `_MAX_BYTES`, however much it would unpack to."""

    def __init__(self, path: pathlib.Path, stream: IO[bytes] | gzip.GzipFile) -> None:
        self.path, self.stream, self.left = path, stream, _MAX_BYTES

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(
                f"{self.path} unpacks to over {_MAX_BYTES} bytes: expected the published file"
            )
        return content


def read_tar(path: pathlib.Path, names: Collection[str]) -> dict[str, bytes]:
    """The regular files called `names` in a .tar.gz, read in memory; nothing is ever extracted.

    Members with other names, links and devices are skipped. The archive is read to its end, which
    is where gzip keeps its checksum. DataError where it is damaged or lacks one of `names`.
    """
    found = {}
    try:
        with gzip.open(path) as unpacked:
            stream = _Bounded(path, unpacked)
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if name not in names or not member.isreg():
                        continue
                    if member.size > _MAX_BYTES:
                        raise DataError(
                            f"{path}: {name} claims {member.size} bytes: expected at most "
                            f"{_MAX_BYTES}"
                        )
                    content = archive.extractfile(member)
                    found[name] = content.read() if content else b""
                    if len(found[name]) != member.size:
                        raise EOFError(f"{name} ends early")
            while stream.read(1 << 20):
                pass
    except DataError:
        raise
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if missing := sorted(set(names) - set(found)):
        raise DataError(f"{path} lacks {missing}: expected the published archive, whole")
    return found


def _damaged(path: pathlib.Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged or cut short ({type(error).__name__}: {error}): expected the published "
        "file, whole; fetch it again"
    )
