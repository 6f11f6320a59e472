"""Weights in files: `.safetensors`, `.npz` and PyTorch's own, told apart by their first bytes.

A file is named by its path. Where it holds several weights, FILE#NAME are those under the key or
behind the wrapper called NAME (`checkpoint.pth#state_dict_ema`, `distiller.pth#student`).

Files come from strangers. Nothing in one is executed, no size that it claims is believed beyond
`torch_files.MAX_BYTES`, and whatever is wrong with it is a WeightsError that names it.
"""

from __future__ import annotations

import io
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from distill_jax.interop import array_files, torch_files
from distill_jax.interop.array_files import NORMALISATION, TYPES
from distill_jax.interop.choosing import choose, only
from distill_jax.interop.torch_weights import (
    WeightsError,
    count_classes,
    from_state_dict,
    to_state_dict,
)
from distill_jax.models import Network, Variables

# What the decoders raise for a damaged file; safetensors has its own kind, caught where it arises.
_DAMAGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
MAX_FILE_BYTES = 4 * torch_files.MAX_BYTES  # a checkpoint may hold an optimizer's state too


def load_variables(
    path: str | os.PathLike[str],
    network: Network,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Variables:
    """The variables of `network` from a file of weights.

    The names may be those of RepDistiller, mdistiller, timm, torchvision or weiaicunzai's
    pytorch-cifar100, behind the names of wrappers (`module.`, `_orig_mod.`, `model.`, `student.`),
    anywhere in a checkpoint; what stands beside the weights is passed over. So are branches
    that the network was trained with.

    Args:
      path: the file, and #NAME behind it where it holds several weights.
      network: whose weights they are.
      normalisation: (mean, std) of the images that the network will see, in units of pixel/255.

    Raises:
      WeightsError: as `read_state_dict` and `from_state_dict` do, or the file says that it was
        trained on images normalised otherwise; names the file.
    """
    state, trained_on = _read(path, lambda contents, name: choose(contents, network, name))
    return _variables(path, state, trained_on, network, normalisation)


def load_counted(
    path: str | os.PathLike[str],
    network: Network,
    wider: Network,
    build: Callable[[int], Network],
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[Variables, int]:
    """The variables of `network` in a file, of as many classes as the file has, and how many.

    Args:
      path: as `load_variables` takes it.
      network: whose weights they are, but for the number of classes.
      wider: the same of one class more.
      build: the same of any number.
      normalisation: as `load_variables` takes it.

    Raises:
      WeightsError: as `load_variables` does.
    """
    counts = [network.classes]

    def chosen(contents: torch_files.Contents, name: str | None) -> dict[str, np.ndarray]:
        state = choose(contents, network, name)
        count = count_classes(state, network, wider)
        if count == network.classes or count < 2:
            return state
        counts[0] = count
        return choose(contents, build(count), name)

    state, trained_on = _read(path, chosen)
    (count,) = counts
    own = network if count == network.classes else build(count)
    return _variables(path, state, trained_on, own, normalisation), count


def _variables(
    path: str | os.PathLike[str],
    state: dict[str, np.ndarray],
    trained_on: np.ndarray | None,
    network: Network,
    normalisation: tuple[Sequence[float], Sequence[float]] | None,
) -> Variables:
    try:
        variables = from_state_dict(state, network)
        if trained_on is not None and normalisation is not None:
            _check_normalisation(trained_on, np.array(normalisation, np.float64))
        return variables
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _check_normalisation(found: np.ndarray, wanted: np.ndarray) -> None:
    # Less than half a gray level is what another split of the same images makes.
    if found.shape == wanted.shape and (np.abs(found - wanted) < 0.5 / 255).all():
        return
    (mean, std), (mean_here, std_here) = found.tolist(), wanted.tolist()
    raise WeightsError(
        f"trained on images normalised by mean {mean} and std {std}: expected mean {mean_here} and "
        f"std {std_here}, as this data is; set dataset.mean and dataset.std to those of the weights"
    )


def save_variables(
    path: str | os.PathLike[str],
    variables: Variables,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Writes a network's variables where `load_variables` and PyTorch read them.

    PyTorch reads `.pth`, `.pt` and `.bin` with `torch.load(path, weights_only=True)`,
    `.safetensors` with `safetensors.torch.load_file`.

    Args:
      path: the file.
      variables: of the network.
      normalisation: (mean, std) of the images that it was trained on, such as
        `(dataset.mean, dataset.std)`. `.safetensors` and `.npz` keep it, and `load_variables`
        refuses them for images normalised otherwise; PyTorch's formats have no place for it.

    Raises:
      WeightsError: as `write_state_dict` does.
    """
    state: dict[str, Any] = to_state_dict(variables)
    keeps = os.fspath(path).lower().endswith((".safetensors", ".npz"))
    if normalisation is not None and keeps:
        state[NORMALISATION] = np.array(normalisation, np.float64)
    write_state_dict(path, state)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The state dict (name -> array, PyTorch's layouts) in a file.

    Types stay as they are in the file, but bfloat16 is widened to float32. A `module.` or
    `_orig_mod.` before all names (DataParallel, torch.compile) is taken off.

    Raises:
      WeightsError: no such file, none of weights, damaged, forged, not finite as float32, several
        state dicts, or one that holds more than tensors.
    """
    return _read(path, only)[0]


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """What tells the weights of a path from others: the file's content, and #NAME if any.

    Raises:
      WeightsError: it is no regular file of at most MAX_FILE_BYTES, or cannot be read.
    """
    place, choice = _place(path)
    return _content(place) + (b"" if choice is None else f"#{choice}".encode())


def _place(path: str | os.PathLike[str]) -> tuple[pathlib.Path, str | None]:
    """The file, and which weights in it; `~` is the home folder."""
    text = os.path.expanduser(os.fspath(path))
    file, mark, choice = text.rpartition("#")
    if mark and not os.path.exists(text) and os.path.exists(file):
        return pathlib.Path(file), choice.strip()
    return pathlib.Path(text), None


def _content(path: pathlib.Path) -> bytes:
    try:
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise WeightsError(f"{path} {what}: expected a file of weights")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise WeightsError(f"{path} has {size} bytes: at most {MAX_FILE_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}): expected a file of weights") from None


_Choose = Callable[[torch_files.Contents, str | None], dict[str, np.ndarray]]


def _read(
    path: str | os.PathLike[str], choose: _Choose
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The weights chosen of a file, and the NORMALISATION where it has it."""
    place, choice = _place(path)
    raw, kind = _content(place), "file of weights"
    try:
        if not raw:
            raise WeightsError("is empty: expected a file of weights")
        kind, read = _kind(place, raw)
        about: dict[str, np.ndarray] = {}
        contents = read(raw)
        if isinstance(contents, dict):
            about = {k: contents.pop(k) for k in (NORMALISATION,) if k in contents}
            contents = _as_contents(contents)
        state = choose(contents, choice)
        for found in about.values():
            if found.dtype != np.float64 or found.ndim != 2 or len(found) != 2:
                raise WeightsError(
                    f"says that images were normalised by {found.dtype} {found.shape}: expected "
                    "float64 (2, channels), mean and std"
                )
        _check({**state, **about})
    except WeightsError as error:
        raise WeightsError(f"{place} {error}") from None
    except _DAMAGE as error:
        raise WeightsError(
            f"{place} cannot be read, or is damaged or cut short ({type(error).__name__}: "
            f"{str(error)[:200]}): expected a whole {kind} file"
        ) from error
    return state, about.get(NORMALISATION)


def _as_contents(state: dict[str, np.ndarray]) -> torch_files.Contents:
    entries = {name: torch_files.Entry(x.shape, x.dtype.name) for name, x in state.items()}
    return torch_files.Contents({"": entries} if state else {}, lambda path: state)


def _kind(path: pathlib.Path, raw: bytes) -> tuple[str, _Read]:
    """What a file is, by its first bytes, else by the ending of its name."""
    if raw[:2] == b"PK" and zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = archive.namelist()
        if any(name.endswith("/data.pkl") for name in names):
            return ".pth", torch_files.read
        if any(name.endswith(".npy") for name in names):
            return ".npz", array_files.read_npz
    elif raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= len(raw) - 8:
        return ".safetensors", array_files.read_safetensors
    elif raw[:1] == b"\x80" or raw[257:262] == b"ustar":
        return ".pth", torch_files.read
    for ending, (read, _) in _FORMATS.items():
        if path.name.lower().endswith(ending):
            return ending, read
    raise WeightsError(
        f"starts with {raw[:8].hex()}: expected a file of torch.save, .safetensors or .npz"
    )


def write_state_dict(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a state dict (name -> array); `read_state_dict` gives back the same bits.

    bfloat16 is widened to float32. The file appears whole or not at all, and replaces an older one.
    The same state gives the same bytes.

    Raises:
      WeightsError: an ending that is not known, a type that not every format has, values that are
        not finite, or a place that cannot be written.
    """
    path = pathlib.Path(os.path.expanduser(path))
    write = _writer(path)
    arrays = {}
    for name, value in state.items():
        array = np.asarray(value)
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        arrays[name] = np.array(array, array.dtype.newbyteorder("="), order="C")
    try:
        if not arrays:
            raise WeightsError("would hold no tensors: expected a state dict")
        _check(arrays)
        torch_files.check_size(sum(array.nbytes for array in arrays.values()))
        _write_whole(path, lambda stream: write(stream, arrays))
    except WeightsError as error:
        raise WeightsError(f"{path} {error}") from None
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be written ({type(error).__name__}: {error}): expected a file name in "
            "an existing folder"
        ) from error


def _write_whole(path: pathlib.Path, write: Callable[[BinaryIO], None]) -> None:
    passing = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    stream = passing.open("xb")
    try:
        with stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(passing, path)
    except BaseException:
        passing.unlink(missing_ok=True)
        raise


def _check(state: Mapping[str, np.ndarray]) -> None:
    for name, array in state.items():
        if array.dtype.name not in TYPES:
            raise WeightsError(
                f"holds {name} as {array.dtype}: expected one of {', '.join(sorted(TYPES))}"
            )
        with np.errstate(over="ignore"):  # a network's variables are float32
            if not np.isfinite(array.astype(np.float32)).all():
                raise WeightsError(f"holds {name} with values that are not finite in float32")


_Read = Callable[[bytes], dict[str, np.ndarray] | torch_files.Contents]
_Write = Callable[[BinaryIO, Mapping[str, np.ndarray]], None]
_TORCH = (torch_files.read, torch_files.write)
_FORMATS: dict[str, tuple[_Read, _Write]] = {
    ".safetensors": (array_files.read_safetensors, array_files.write_safetensors),
    ".npz": (array_files.read_npz, array_files.write_npz),
    **dict.fromkeys((".pth", ".pt", ".pth.tar", ".bin"), _TORCH),
}


def _writer(path: pathlib.Path) -> _Write:
    for ending, (_, write) in _FORMATS.items():
        if path.name.lower().endswith(ending):
            return write
    raise WeightsError(f"{path}: expected a name that ends in one of {', '.join(_FORMATS)}")
