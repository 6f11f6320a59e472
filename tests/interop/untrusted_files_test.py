"""Files of strangers, through the public cli: none runs, none writes elsewhere, all end in words.

Each attack would leave a canary where it went through.
"""

import gzip
import io
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

import distill_jax
from distill_jax import data
from distill_jax.data import files
from distill_jax.interop import torch_files

TINY = {
    "dataset": {"name": "synthetic:8x8x1:4:48:32", "valid_fraction": 0.25},
    "networks": ("plane4", "plane2"),
    "guidance": ("direct",),
    "recipe": {"epochs": 1, "batch_size": 12},
}


class Attack:
    """Unpickled by Python's own pickle, it makes the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    """A place that must stay empty."""
    place = tmp_path / "canary"
    yield place
    assert not place.exists()


def test_the_attack_works_on_what_is_not_guarded(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def refused(*parts, **config):
    with pytest.raises((distill_jax.ConfigError, data.DataError)) as caught:
        distill_jax.run({**TINY, **config})
    for part in parts:
        assert part in str(caught.value)


def zipped(members, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def claims(shape):
    """A `.npy` of a few bytes that says it has `shape`."""
    stream = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue() + bytes(64)


def safetensors(header, length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header


def legacy(canary):
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Attack(canary), [])
    return b"".join(pickle.dumps(part, 2) for part in parts)


# ---------------------------------------------------------------------------------------- weights
WEIGHTS = {
    "pickle.pth": (lambda c: pickle.dumps(Attack(c)), ["mkdir", "only tensors are read"]),
    "pickle_in_zip.pth": (
        lambda c: zipped({"a/data.pkl": pickle.dumps({"w": Attack(c)}), "a/version": b"3"}),
        ["mkdir", "only tensors are read"],
    ),
    "pickle_in_legacy.pt": (legacy, ["mkdir", "only tensors are read"]),
    "by_name.bin": (
        lambda c: zipped({"a/data.pkl": b"cos\nsystem\n(S'mkdir " + str(c).encode() + b"'\ntR."}),
        ["os.system", "only tensors are read"],
    ),
    "objects.npz": (
        lambda c: zipped({"w.npy": npy(np.array([Attack(c)], object))}),
        ["Object arrays cannot be loaded"],
    ),
    "no_array.npz": (lambda c: zipped({"w": pickle.dumps(Attack(c))}), ["expected arrays only"]),
    "elsewhere.npz": (lambda c: zipped({f"../../{c.name}.npy": npy(np.ones(3))}), ["unexpected"]),
    "bomb.npz": (
        lambda c: zipped({"w.npy": bytes(2**22)}, zipfile.ZIP_DEFLATED),
        ["claims 4194304 bytes", "at most 1048576"],
    ),
    "huge_claim.npz": (lambda c: zipped({"w.npy": claims((2**40,))}), ["damaged or cut short"]),
    "odd_claim.npz": (lambda c: zipped({"w.npy": claims((2**62, 2**62))}), ["damaged or cut"]),
    "bomb.pth": (
        lambda c: zipped({"a/data.pkl": bytes(2**22)}, zipfile.ZIP_DEFLATED),
        ["is compressed", "expected a file of torch.save"],
    ),
    "nested.safetensors": (
        lambda c: safetensors(b"[" * 100_000),
        ["expected a whole .safetensors file"],
    ),
    "no_json.safetensors": (lambda c: safetensors(b"}{"), ["expected a whole .safetensors file"]),
    "others_json.safetensors": (
        lambda c: safetensors(b'{"compilerOptions": {"strict": true}}'),
        ["expected a whole .safetensors file"],
    ),
    "claims.safetensors": (
        lambda c: safetensors(b"{}", 2**60),
        ["expected a whole .safetensors file"],
    ),
    "about.safetensors": (
        lambda c: safetensors(b'{"__metadata__": {"__normalisation__": "[[[[1]]]]"}}'),
        ["holds no tensors"],
    ),
    "normalised.npz": (
        lambda c: zipped({"w.npy": npy(np.ones(3)), "__normalisation__.npy": npy(np.ones(9))}),
        ["normalised by float64 (9,)", "expected float64 (2, channels)"],
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, tmp_path, canary, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_BYTES", 2**20)
    make, parts = WEIGHTS[name]
    (tmp_path / name).write_bytes(make(canary))
    before = sorted(tmp_path.iterdir())
    refused(str(tmp_path / name), *parts, teacher_weights=str(tmp_path / name))
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_larger_than_any_weights_is_not_read(tmp_path):
    path = tmp_path / "sparse.pth"
    with path.open("wb") as file:
        file.truncate(2**40)
    refused("has 1099511627776 bytes", "are read", teacher_weights=str(path))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    refused("is no regular file", teacher_weights=str(tmp_path / "pipe.npz"))


# ----------------------------------------------------------------------------------------- images
PYTHON, BINARY = "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"
BATCHES = [f"cifar-10-batches-py/{n}" for n in (*(f"data_batch_{i}" for i in range(1, 6)),)]
BATCHES += ["cifar-10-batches-py/test_batch"]


def tarred(members):
    """A .tar.gz of (name, content) or ready `TarInfo`s."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def claiming(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


ARCHIVES = {
    "pickles": (
        PYTHON,
        lambda c: tarred([(name, pickle.dumps(Attack(c))) for name in BATCHES]),
        ["mkdir", "was not run"],
    ),
    "leaves the folder": (
        PYTHON,
        lambda c: tarred([(f"../{c.name}", b"x"), (str(c), b"x"), (f"a/../../{c.name}", b"x")]),
        ["lacks", "expected the published archive"],
    ),
    "links": (
        PYTHON,
        lambda c: tarred([link(BATCHES[0], str(c)), link(BATCHES[1], str(c), tarfile.LNKTYPE)]),
        ["lacks", "expected the published archive"],
    ),
    "devices": (
        BINARY,
        lambda c: tarred([link("cifar-10-batches-bin/data_batch_1.bin", "", tarfile.FIFOTYPE)]),
        ["lacks", "expected the published archive"],
    ),
    "claims": (
        BINARY,
        lambda c: claiming("cifar-10-batches-bin/data_batch_1.bin", 2**35),
        ["claims 34359738368 bytes", "expected at most"],
    ),
    "bomb": (
        BINARY,
        lambda c: tarred([("zeros", bytes(2**23))]),
        ["unpacks to over", "expected the published file"],
    ),
    "bomb behind the end": (
        BINARY,
        lambda c: tarred([]) + gzip.compress(bytes(2**23)),
        ["unpacks to over", "expected the published file"],
    ),
    "no tar": (PYTHON, lambda c: gzip.compress(b"x" * 5000), ["is damaged", "expected the"]),
    "no gzip": (PYTHON, lambda c: b"x" * 5000, ["is damaged", "expected the published file"]),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name, tmp_path, canary, monkeypatch):
    monkeypatch.setattr(files, "_MAX_BYTES", 2**22)
    file, make, parts = ARCHIVES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / file).write_bytes(make(canary))
    before = sorted(tmp_path.rglob("*"))
    refused(*parts, dataset={"name": "cifar10", "data_dir": str(folder)})
    assert sorted(tmp_path.rglob("*")) == before


def test_unpacked_pickles(tmp_path, canary):
    for name in BATCHES:
        path = pathlib.Path(tmp_path, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Attack(canary)))
    refused("mkdir", "was not run", dataset={"name": "cifar10", "data_dir": str(tmp_path)})


@pytest.mark.parametrize("packed", [True, False])
def test_idx_bombs(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_BYTES", 2**20)
    content = bytes(2**21)
    name = "train-images-idx3-ubyte" + (".gz" if packed else "")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    dataset = {"name": "fashion_mnist", "data_dir": str(tmp_path)}
    refused("holds over 1048576 bytes", "expected the published file", dataset=dataset)
