"""Weights in files: exact both ways, and nothing that a stranger wrote is run or believed.

`data/torch_zip.pth` and `data/torch_legacy.pth` hold one checkpoint, written by PyTorch 2.13 in its
present format and in the one before 1.6; `real_state` says what is in it.
"""

import copy
import io
import os
import pathlib
import pickle
import random
import shutil
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from distill_jax.interop import torch_files
from distill_jax.interop.files import (
    load_variables,
    read_state_dict,
    save_variables,
    write_state_dict,
)
from distill_jax.interop.torch_weights import WeightsError
from distill_jax.models import build, register_network

DATA = pathlib.Path(__file__).parent / "files"
REAL = (DATA / "torch_zip.pth", DATA / "torch_legacy.pth")
ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".pth.tar", ".bin")
FORMATS = ENDINGS[:3]


def real_state():
    base = np.arange(24, dtype=np.float32)
    return {
        "all": base,
        "transposed": base.reshape(4, 6).T,
        "slice": base.reshape(4, 6)[1:3, 2::2],
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "half": np.array([0.5, -2], np.float16),
        "bfloat16": np.array([0.5, -3], np.float32),
        "counter": np.array(7),
        "parameter": np.array([1, -1], np.float32),
    }


def assert_same(found, expected):
    assert list(found) == list(expected) or sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------ files of torch.save by hand
def torch_zip(path, pickled, storages=None, order=b"little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", order)
        for key, content in (storages or {}).items():
            archive.writestr(f"x/data/{key}", content)
    return path


def legacy_header(little=True):
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little})
    return b"".join(pickle.dumps(part, 2) for part in parts)


def op(value):
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(op, value)) + b"t"
    if isinstance(value, int):
        raw = pickle.encode_long(value)
        return b"\x8a" + bytes([len(raw)]) + raw
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(offset=0, size=(2,), stride=(1,), count=2, key="0", kind=b"FloatStorage", more=()):
    storage = op(("storage", b"ctorch\n" + kind + b"\n", key, "cpu", count, *more)) + b"Q"
    arguments = op((storage, offset, size, stride, b"\x89", b"}"))
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def mapping(*pairs):
    return b"}(" + b"".join(op(key) + op(value) for key, value in pairs) + b"u"


def of_one(path, **changes):
    """A file whose only tensor lies in a storage of 1 and 2."""
    raw = np.array([1, 2], np.float32).tobytes()
    return torch_zip(path, b"\x80\x02" + mapping(("w", tensor(**changes))) + b".", {"0": raw})


# ------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_checkpoint_of_pytorch_is_read_to_the_bit(path):
    assert_same(read_state_dict(path), real_state())


def test_the_hand_made_file_that_the_untrusted_ones_vary_is_good(tmp_path):
    path = of_one(tmp_path / "w.pth")
    assert_same(read_state_dict(path), {"w": np.array([1, 2], np.float32)})


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", None])
def test_the_state_dict_is_found(tmp_path, key):
    inner = mapping(("module.a.weight", tensor()), ("module.b.bias", tensor()))
    outer = mapping((key, inner), ("epoch", 3), ("rng", tensor())) if key else inner
    path = torch_zip(tmp_path / "w.pth", outer + b".", {"0": np.ones(2, "f4").tobytes()})
    assert sorted(read_state_dict(path)) == ["a.weight", "b.bias"]


def test_a_prefix_that_not_all_names_share_stays(tmp_path):
    write_state_dict(tmp_path / "w.npz", {"module.a": np.ones(1), "b": np.ones(1)})
    assert sorted(read_state_dict(tmp_path / "w.npz")) == ["b", "module.a"]


def test_pickles_of_other_protocols_and_of_plain_things_are_read(tmp_path):
    plain = {"list": [1, [2.5, None], "x"], "tuple": (True, b"y", ()), 1: {"z": -(10**20)}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if protocol in (0, 1, 2):  # these spell bytes as a call
            plain["tuple"] = (True, "y", ())
        stream = io.BytesIO(pickle.dumps(plain, protocol) + b"rest")
        assert torch_files.torch_pickle.read_pickle(stream) == plain
        assert stream.read() == b"rest"


def test_big_endian_storages_are_turned(tmp_path):
    pickled = mapping(("w", tensor()), ("b", tensor(key="1", kind=b"BFloat16Storage"))) + b"."
    storages = {"0": np.array([1, 2], ">f4").tobytes(), "1": b"\x3f\x80\xc0\x40"}
    path = torch_zip(tmp_path / "w.pth", pickled, storages, b"big")
    expected = {"w": np.array([1, 2], np.float32), "b": np.array([1, -3], np.float32)}
    assert_same(read_state_dict(path), expected)


def test_every_bfloat16_is_widened_exactly(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits[(bits & 0x7F80) != 0x7F80].view(jnp.bfloat16)
    expected = {"w": values.astype(np.float32)}
    (tmp_path / "w.safetensors").write_bytes(safetensors.numpy.save({"w": values}))
    assert_same(read_state_dict(tmp_path / "w.safetensors"), expected)
    for ending in FORMATS:
        write_state_dict(tmp_path / f"v{ending}", {"w": values})
        assert_same(read_state_dict(tmp_path / f"v{ending}"), expected)


# ----------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_state_dict_comes_back_to_the_bit(tmp_path, ending):
    tiny = np.array([0.0, -0.0, 1e-45, 3.4e38], np.float32)
    types = ["float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    state = {
        **real_state(),
        **{name: np.array([[1, 0, 3]]).astype(name) for name in types},
        "tiny": tiny,
        "strided": np.arange(60, dtype=np.float32).reshape(3, 4, 5).transpose(2, 0, 1)[::2],
        "big_endian": np.array([1, 2], ">f4"),
        "file": tiny,
        "ünï.weight": tiny,
        "x.npy": tiny,
    }
    expected = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in state.items()}
    path = tmp_path / f"w{ending}"
    write_state_dict(path, state)
    assert_same(read_state_dict(path), expected)
    first = path.read_bytes()
    write_state_dict(path, state)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", FORMATS)
def test_variables_come_back_to_the_bit(tmp_path, ending):
    network = build("plane2", 10, (8, 8, 3))
    shapes, rng = jax.eval_shape(network.init, jax.random.key(0)), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_variables(tmp_path / f"w{ending}", variables)
    found = load_variables(tmp_path / f"w{ending}", network)
    assert jax.tree.structure(found) == jax.tree.structure(dict(variables))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    with pytest.raises(WeightsError, match=rf"w\{ending}: .*plane4"):
        load_variables(tmp_path / f"w{ending}", build("plane4", 10, (8, 8, 3)))


def test_leaves_that_pytorch_would_call_alike_are_all_kept(tmp_path):
    head = {"kernel": jnp.ones((4, 3)), "scale": 5 * jnp.ones(())}  # of a cosine classifier
    variables = {"params": {"head": head}, "averages": {"head": {"kernel": jnp.zeros((4, 3))}}}

    def apply(variables, x):
        return x.reshape(len(x), -1) @ variables["params"]["head"]["kernel"]

    register_network("cosine_in_a_file", lambda *_: (lambda key: variables, apply))
    save_variables(tmp_path / "w.npz", variables)
    found = load_variables(tmp_path / "w.npz", build("cosine_in_a_file", 3, (2, 2, 1)))
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, variables)))


# ---------------------------------------------------------------------------------- untrusted files
class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_file_is_run(tmp_path, protocol):
    victim = tmp_path / "touched"
    command = f"touch {victim}"
    attacks = {
        r"\.system": Runs(os.system, command),
        "eval": Runs(eval, f"open({str(victim)!r}, 'w')"),
        r"io\.open": Runs(open, str(victim), "w"),
        "getattr": Runs(getattr, "", "join"),
    }
    for name, attack in attacks.items():
        for content in (attack, {"state_dict": {}, "epoch": attack}, [attack]):
            pickled = pickle.dumps(content, protocol)
            path = torch_zip(tmp_path / "w.pth", pickled)
            with pytest.raises(WeightsError, match=rf"w\.pth refused: .* run .*{name}"):
                read_state_dict(path)
            for legacy in (pickled, legacy_header() + pickled):
                path.write_bytes(legacy)
                with pytest.raises(WeightsError, match="refused|expected a file of torch.save"):
                    read_state_dict(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch x'\no.",  # OBJ
        b"\x82\x01.",  # EXT1
        b"ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"ctorch\nFloatStorage\n)R.",  # a call of a storage
        b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00ab.",  # a state for a class
        b"ctorch.storage\n_load_from_bytes\n)R.",
        b"ctorch.nn.modules.linear\nLinear\n.",
        b"\x80\x02)\x8a\x01\x05\x86\x94" + b"\x86" * 9 + b".",  # stack underflow
        b"Nr\xff\xff\xff\x7f}.",  # memo index of two billion
        b"}" + b")" + b"\x85" * 200_000 + b"Ns.",  # hashing this key would end the process
        b")" + b"\x85" * 200_000 + b".",
        b"}q\x00" + op("a") + b"h\x00s.",  # holds itself
        b"((((.",
        b"}(N}u.",
        b"(t",
        b"\x8e" + b"\xff" * 8 + b".",  # bytes without end
        b"",
    ],
)
def test_odd_pickles_are_refused(tmp_path, pickled):
    with pytest.raises(WeightsError, match=r"w\.pth "):
        read_state_dict(torch_zip(tmp_path / "w.pth", pickled))
    (tmp_path / "w.pt").write_bytes(legacy_header() + pickled)
    with pytest.raises(WeightsError, match=r"w\.pt "):
        read_state_dict(tmp_path / "w.pt")


def test_odd_keys_of_legacy_storages_are_refused(tmp_path):
    content = mapping(("w", tensor(more=(b"N",)))) + b"."
    good = np.ones(2, np.float32)
    storages = struct.pack("<q", 2) + good.tobytes()
    path = tmp_path / "w.pt"
    path.write_bytes(legacy_header() + content + pickle.dumps(["0"], 2) + storages)
    assert_same(read_state_dict(path), {"w": good})
    deep = b"](" + b")" + b"\x85" * 200_000 + b"e."  # hashing this key would end the process
    for keys in (deep, pickle.dumps(["1"], 2), pickle.dumps([], 2), b"N.", b""):
        path.write_bytes(legacy_header() + content + keys + storages)
        with pytest.raises(WeightsError, match=r"w\.pt "):
            read_state_dict(path)
    for length in (1, -1, 2**62):
        storages = struct.pack("<q", length) + good.tobytes()
        path.write_bytes(legacy_header() + content + pickle.dumps(["0"], 2) + storages)
        with pytest.raises(WeightsError, match="no tensor asks for"):
            read_state_dict(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1002, 2))
    with pytest.raises(WeightsError, match="protocol 1002: expected 1001"):
        read_state_dict(path)
    path.write_bytes(legacy_header(little=False) + content)
    with pytest.raises(WeightsError, match="big-endian"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, "w reaches beyond the 2"),
        ({"offset": 3, "size": (0,)}, "w reaches beyond the 2"),
        ({"offset": 6, "size": (0,), "stride": (5,)}, "w reaches beyond"),
        ({"stride": (2,)}, "w reaches beyond"),
        ({"size": (3,)}, "w reaches beyond"),
        ({"size": (2**62, 2**62), "stride": (0, 2**62)}, "w reaches beyond"),
        ({"offset": -1}, "w has offset -1"),
        ({"size": (-2,)}, "w has offset 0, size"),
        ({"offset": 1, "stride": (-1,)}, "strides"),
        ({"stride": (1, 1)}, "strides"),
        ({"size": (1,) * 65, "stride": (0,) * 65}, "strides"),
        ({"offset": "1"}, "w has offset 1"),
        ({"size": (b"\x88",)}, "w has offset"),
        ({"size": b"N"}, "w is no tensor"),
        ({"stride": b"N"}, "damaged"),
        ({"size": (2**40,), "stride": (0,)}, "claims 4398046511104 bytes"),
        ({"count": 3}, "w expected 3 float32, found 8 bytes"),
        ({"count": -1, "size": (0,)}, "w has"),
        ({"count": 1, "size": (1,)}, "w expected 1 float32, found 8 bytes"),
        ({"kind": b"DoubleStorage"}, "w expected 2 float64, found 8 bytes"),
        ({"key": "../../../etc/passwd"}, "damaged"),
        ({"key": "1"}, "damaged"),
        ({"key": b"N"}, "damaged"),
        ({"kind": b"ComplexFloatStorage"}, r"refused: .*torch\.ComplexFloatStorage"),
        ({"kind": b"Size"}, r"refused: .*torch\.Size"),
        ({"more": ((1, 2, 3),)}, "damaged"),
    ],
)
def test_forged_tensors_are_refused(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        read_state_dict(of_one(tmp_path / "w.pth", **changes))


def test_a_state_is_for_dictionaries_only(tmp_path):
    storages = {"0": np.ones(2, np.float32).tobytes()}
    good = b"ccollections\nOrderedDict\n)R(" + op("w") + tensor() + b"u}" + op("x") + b"Nsb."
    assert "w" in read_state_dict(torch_zip(tmp_path / "w.pth", good, storages))
    bad = mapping(("w", tensor() + b"}b")) + b"."
    with pytest.raises(WeightsError, match="a state for what has none"):
        read_state_dict(torch_zip(tmp_path / "w.pth", bad, storages))


def test_views_within_a_storage_are_not_refused(tmp_path):
    for changes, expected in (
        ({"offset": 1, "size": (1,)}, [2]),
        ({"offset": 2, "size": (0,)}, []),
        ({"size": (2, 2), "stride": (0, 1)}, [[1, 2], [1, 2]]),
        ({"size": (), "stride": (), "offset": 1}, 2),
    ):
        found = read_state_dict(of_one(tmp_path / "w.pth", **changes))["w"]
        np.testing.assert_array_equal(found, np.array(expected, np.float32), strict=True)


def test_zip_bombs_are_refused(tmp_path, monkeypatch):
    pickled = mapping(("w", tensor(count=2**18, size=(2**18,)))) + b"."
    storage = {"0": bytes(2**20)}
    path = torch_zip(tmp_path / "w.pth", pickled, storage, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed"):
        read_state_dict(path)
    path = torch_zip(tmp_path / "w.pth", pickled, storage)
    with zipfile.ZipFile(path, "a") as archive:  # a second directory entry for the same bytes
        twin = copy.copy(archive.getinfo("x/data/0"))
        twin.filename = "x/data/1"
        archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(WeightsError, match="claims more bytes than it has"):
        read_state_dict(path)
    np.savez_compressed(tmp_path / "w.npz", w=np.zeros(2**20, np.float32))
    assert read_state_dict(tmp_path / "w.npz")["w"].size == 2**20
    monkeypatch.setattr(torch_files, "MAX_BYTES", 2**21)
    with pytest.raises(WeightsError, match="w.npz claims 4194432 bytes"):
        read_state_dict(tmp_path / "w.npz")
    with pytest.raises(WeightsError, match="claims 4194304 bytes"):
        write_state_dict(tmp_path / "v.npz", {"w": np.zeros(2**20, np.float32)})


def test_an_array_larger_than_its_member_is_refused(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.zeros(4, np.float32))
    forged = content.getvalue().replace(b"(4,), }      ", b"(4000000,), }")
    assert b"(4000000,), }" in forged
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("w.npy", forged)
    with pytest.raises(WeightsError, match=r"w\.npz .*damaged"):
        read_state_dict(tmp_path / "w.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_come_twice_are_refused(tmp_path):
    pair = mapping(("w", tensor()), ("w", tensor())) + b"."
    path = torch_zip(tmp_path / "w.pth", pair, {"0": np.ones(2, "f4").tobytes()})
    with pytest.raises(WeightsError, match="holds 'w' twice"):
        read_state_dict(path)
    for name, member in (("w.pth", "x/data/0"), ("w.npz", "w.npy")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, b"")
            archive.writestr(member, b"")
            archive.writestr("x/data.pkl", b"")
        with pytest.raises(WeightsError, match=f"holds '{member}' twice"):
            read_state_dict(tmp_path / name)
    entry = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = b"{" + entry + b"," + entry + b"}"
    raw = struct.pack("<Q", len(header)) + header + bytes(4)
    (tmp_path / "w.safetensors").write_bytes(raw)
    with pytest.raises(WeightsError, match="holds 'w' twice"):
        read_state_dict(tmp_path / "w.safetensors")
    both = mapping(("model", mapping(("w", tensor()))), ("net", mapping(("w", tensor())))) + b"."
    with pytest.raises(WeightsError, match="several weights, under model, net: expected one"):
        read_state_dict(torch_zip(tmp_path / "w.pth", both))


# ----------------------------------------------------------------------------------- plain mistakes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("ending", FORMATS)
def test_weights_that_are_not_finite_are_refused(tmp_path, ending, value, monkeypatch):
    path = tmp_path / f"w{ending}"
    state = {"good": np.ones(2), "conv.weight": np.array([1, value])}
    with pytest.raises(WeightsError, match="holds conv.weight with values that are not finite"):
        write_state_dict(path, state)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("distill_jax.interop.files._check", lambda state: None)
        write_state_dict(path, state)
    with pytest.raises(WeightsError, match="holds conv.weight with values that are not finite"):
        read_state_dict(path)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.array([1j])])
def test_arrays_of_other_things_are_refused(tmp_path, array):
    for ending in FORMATS:
        with pytest.raises(WeightsError, match="holds w as .* expected one of bool, float16"):
            write_state_dict(tmp_path / f"w{ending}", {"w": array})
    np.savez(tmp_path / "w.npz", w=array)
    with pytest.raises(WeightsError, match=r"w\.npz"):
        read_state_dict(tmp_path / "w.npz")


@pytest.mark.parametrize("ending", ENDINGS)
def test_paths_that_are_no_weights_are_named(tmp_path, ending):
    path = tmp_path / f"w{ending}"
    with pytest.raises(WeightsError, match=rf"{path} does not exist: expected a file of weights"):
        read_state_dict(path)
    with pytest.raises(WeightsError, match="would hold no tensors"):
        write_state_dict(path, {})
    path.touch()
    with pytest.raises(WeightsError, match=rf"{path} is empty"):
        read_state_dict(path)
    path.write_text("no weights at all")
    with pytest.raises(WeightsError, match=rf"{path} .*expected"):
        read_state_dict(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(WeightsError, match=rf"{path} is no regular file"):
        read_state_dict(path)
    for bad in (path, path / "none" / f"w{ending}", path / "f.txt" / f"w{ending}"):
        (path / "f.txt").touch()
        with pytest.raises(WeightsError, match=rf"{bad} cannot be written"):
            write_state_dict(bad, real_state())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_other_endings_and_contents_are_refused(tmp_path):
    for path in (tmp_path / "w.h5", tmp_path / "w", tmp_path / "w.tar"):
        with pytest.raises(WeightsError, match=r"ends in one of"):
            write_state_dict(path, real_state())
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
        with pytest.raises(WeightsError, match=r"starts with 89484446.*expected a file of torch"):
            read_state_dict(path)
    (tmp_path / "w.pth").write_bytes(bytes(257) + b"ustar" + bytes(250))
    with pytest.raises(WeightsError, match="is a tar archive"):
        read_state_dict(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"holds no tensors by name: .* holds \['epoch'\]"):
        read_state_dict(torch_zip(tmp_path / "w.pth", mapping(("epoch", 1)) + b"."))
    with pytest.raises(WeightsError, match="byte order b'middle'"):
        read_state_dict(torch_zip(tmp_path / "w.pth", b"N.", order=b"middle"))


@pytest.mark.parametrize("named", [*FORMATS, ".ckpt", ".h5", "", "-acc=0.93,best.PTH"])
def test_the_first_bytes_tell_the_kind_and_not_the_name(tmp_path, named):
    for written in FORMATS:
        write_state_dict(tmp_path / f"w{written}", real_state())
        os.rename(tmp_path / f"w{written}", tmp_path / f"v{named}")
        path = tmp_path / f"v{named}"
        assert_same(read_state_dict(path), real_state())
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(WeightsError, match="expected"):
            read_state_dict(path)
    shutil.copy(REAL[1], path)
    assert_same(read_state_dict(path), real_state())


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    write_state_dict(path, real_state())

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match="cannot be written .*no space left"):
        write_state_dict(path, {"other": np.ones(1)})
    assert_same(read_state_dict(path), real_state())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("source", ["torch_zip.pth", "torch_legacy.pth", ".safetensors", ".npz"])
def test_damage_is_an_error_with_a_name_or_harmless(tmp_path, source):
    whole = DATA / source
    if source.startswith("."):
        whole = tmp_path / f"whole{source}"
        write_state_dict(whole, real_state())
    raw, path, rng = whole.read_bytes(), tmp_path / f"w{whole.suffix}", random.Random(0)
    for end in [*range(0, len(raw), 37), len(raw) - 1]:
        path.write_bytes(raw[:end])
        with pytest.raises(WeightsError, match=rf"{path} .*expected"):
            read_state_dict(path)
    for _ in range(200):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except WeightsError as error:
            assert str(path) in str(error)
