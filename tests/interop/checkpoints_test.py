"""Checkpoints as training scripts leave them: whose weights are taken, and what is refused.

The files are put together by hand, as `torch.save` lays them out, since PyTorch is not needed here.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import re
import struct
import zipfile

import jax
import numpy as np
import pytest

import distill_jax
from distill_jax.interop.files import (
    load_variables,
    read_bytes,
    read_state_dict,
    save_variables,
    write_state_dict,
)
from distill_jax.interop.torch_weights import WeightsError, entries, to_state_dict
from distill_jax.models import build
from experiments import golden
from experiments.parity.cases import network_name

SHAPE = (8, 8, 1)
NETWORK = build("resnet8", 4, SHAPE)
STORAGES = {"float32": "Float", "float16": "Half", "int64": "Long", "int8": "Char", "bool": "Bool"}


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def encoded(value, storages):
    """The opcodes of a dict of dicts, arrays as tensors, and anything that can be pickled."""
    if isinstance(value, Raw):
        return value.opcodes
    if type(value) is dict and all(isinstance(key, str) for key in value):
        pairs = (text(key) + encoded(x, storages) for key, x in value.items())
        return b"}(" + b"".join(pairs) + b"u"
    if not isinstance(value, np.ndarray):
        return pickle.dumps(value, 2)[2:-1]
    value, key = np.array(value, order="C"), str(len(storages))
    storages[key] = value.tobytes()
    kind = f"ctorch\n{STORAGES[value.dtype.name]}Storage\n".encode()
    size, stride = (b"(" + b"".join(numbers) + b"t" for numbers in layout(value))
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + number(value.size) + b"tQ"
    rest = storage + number(0) + size + stride + b"\x89}t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + rest + b"R"


def number(value):
    return b"J" + struct.pack("<i", value)


def layout(array):
    strides = [stride // array.itemsize for stride in array.strides]
    return [number(n) for n in array.shape], [number(n) for n in strides]


class Raw:
    """Opcodes as they are."""

    def __init__(self, opcodes):
        self.opcodes = opcodes


def save(path, value):
    storages = {}
    pickled = b"\x80\x02" + encoded(value, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for key, content in storages.items():
            archive.writestr(f"x/data/{key}", content)
    return path


def save_before_1_6(path, state, beside):
    """The older layout: a state dict of float32, and opcodes beside it with their storage "c"."""
    storages = {}
    parts = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts.append(b"\x80\x02" + encoded({"beside": beside, "model": state}, storages) + b".")
    counts = {key: len(content) // 4 for key, content in storages.items()} | {"c": 2}
    storages["c"] = bytes(16)
    parts.append(pickle.dumps(list(storages), 2))
    parts += [struct.pack("<q", counts[key]) + content for key, content in storages.items()]
    path.write_bytes(b"".join(parts))
    return path


def weights(name="resnet8", seed=0, **changes):
    rng = np.random.default_rng(seed)
    state = {
        name: rng.uniform(0.1, 1, shape).astype(np.float32)
        for name, shape in entries(build(name, 4, SHAPE))
    }
    return {**state, "bn1.num_batches_tracked": np.array(3), **changes}


def behind(prefix, state):
    return {prefix + name: array for name, array in state.items()}


def same(variables, state):
    found = to_state_dict(variables)
    assert found.keys() == {k for k in state if not k.endswith("num_batches_tracked")}
    for name, array in found.items():
        np.testing.assert_array_equal(array, state[name].astype(np.float32), name)


OWN, OTHER, DEEPER = weights(), weights(seed=1), weights("resnet14", seed=2)
AVERAGED = {"n_averaged": np.array(7)}
PARAMETERS = {name: array for name, array in OTHER.items() if "running" not in name}
NAMESPACE = argparse.Namespace(model="resnet8", lr_decay_epochs=[150, 180])
OPTIMIZER = {
    "state": Raw(b"}(K\x00" + encoded({"exp_avg": np.ones(3, "f4")}, {}) + b"u"),
    "param_groups": [{"lr": 0.1, "params": [0, 1]}],
}
TAKEN = {
    "alone": OWN,
    "DataParallel": behind("module.", OWN),
    "compiled": behind("_orig_mod.", OWN),
    "compiled and parallel": behind("module._orig_mod.", OWN),
    "averaged": behind("module.", OWN) | AVERAGED,
    "named by a wrapper of one's own": {"net": behind("classifier_net.", OWN), "acc": 93.1},
    "Lightning": {
        "state_dict": behind("model.", OWN),
        "hyper_parameters": {"lr": 0.1, "options": NAMESPACE},
        "callbacks": {"ModelCheckpoint": {"best_model_score": np.ones((), "f4")}},
        "optimizer_states": [OPTIMIZER],
        "pytorch-lightning_version": "2.1",
    },
    "RepDistiller": {"epoch": 240, "model": OWN, "best_acc": np.ones((), "f4")},
    "RepDistiller's last": {"opt": NAMESPACE, "model": OWN},
    "mdistiller": {"epoch": 3, "model": behind("module.student.", OWN), "optimizer": OPTIMIZER},
    "timm": {"arch": "x", "state_dict": OWN, "version": 2, "args": NAMESPACE},
    "options about averages": {
        "model": OWN,
        "ema": True,
        "ema_decay": 0.9,
        "ema_acc": np.float64(),
    },
    "a teacher of another depth": {"model": OWN, "teacher": DEEPER},
    "a key that nobody knows": {"run": {"best": {"weights": OWN}}},
    "other names": {
        name.replace("downsample", "shortcut").replace("fc.", "linear."): array
        for name, array in OWN.items()
    },
    "counted by thop": {
        "net": OWN | {"total_ops": np.ones(1, "f4"), "fc.total_params": np.ones(1, "f4")}
    },
    "half": {name: array.astype(np.float16) for name, array in OWN.items()},
}


@pytest.mark.parametrize("name", TAKEN)
def test_weights_are_found_behind_wrappers_and_beside_other_things(tmp_path, name):
    wanted = TAKEN[name] if name == "half" else OWN
    same(load_variables(save(tmp_path / "w.pth", TAKEN[name]), NETWORK), wanted)


BESIDE = {
    "counter": collections.Counter([80, 120, 120]),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "namespace": NAMESPACE,
    "scalar": np.float64(73.1),
    "array": Raw(pickle.dumps(np.arange(5), 2)[2:-1]),
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "odd keys": {(1, 2): 3, 1.5: 2, None: 1, b"x": 2},
    "date": datetime.datetime(2020, 1, 1),
    "path": pathlib.PurePosixPath("/x"),
    "class": dict,
    "function": os.getcwd,
    "complex": 1j,
    "quantised": Raw(b"ctorch._utils\n_rebuild_qtensor\n)R"),
    "object": Raw(b"cmy.module\nNet\n)\x81}" + text("weight") + b"Nsb"),
    "old class": Raw(b"(imy.module\nNet\n"),
    "call of what a call gave": Raw(b"cbuiltins\ngetattr\n)R)R"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_weights_is_passed_over_and_refused_among_them(tmp_path, name):
    path = tmp_path / "w.pth"
    same(load_variables(save(path, {"beside": BESIDE[name], "model": OWN}), NETWORK), OWN)
    assert read_state_dict(path).keys() == OWN.keys()
    if name not in ("odd keys", "class", "function"):
        save(path, {"model": OWN | {"fc.weight": BESIDE[name]}})
        with pytest.raises(
            WeightsError, match=r"w\.pth refused: .*only tensors are read.*fc.weight"
        ):
            load_variables(path, NETWORK)


def test_the_same_before_1_6(tmp_path):
    kind = b"ctorch\nComplexFloatStorage\n"
    storage = b"(" + text("storage") + kind + text("c") + text("cpu") + number(2) + b"tQ"
    module = b"(" + text("module") + b"cmy.module\nNet\n" + text("net.py") + text("...") + b"tQ"
    beside = Raw(b"](" + storage + module + b")\x81e")
    state = {name: array for name, array in OWN.items() if array.dtype == np.float32}
    same(load_variables(save_before_1_6(tmp_path / "w.pth", state, beside), NETWORK), OWN)


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_beside_the_weights_is_run(tmp_path, protocol):
    attack = pickle.dumps({"a": [Touch(tmp_path / "canary")]}, protocol)
    attack = Raw(re.sub(rb"^\x80.(\x95.{8})?", b"", attack, flags=re.DOTALL)[:-1])
    path = save(tmp_path / "w.pth", {"model": OWN, "opt": attack})
    same(load_variables(path, NETWORK), OWN)
    assert list(tmp_path.iterdir()) == [path]


AS_LIST = Raw(b"](" + encoded(OTHER["fc.weight"], {}) + b"e")
SEVERAL = {
    "timm": ({"state_dict": OWN, "state_dict_ema": OTHER}, "state_dict", "state_dict_ema"),
    "torchvision": (
        {"model": OWN, "model_ema": behind("module.", OTHER) | AVERAGED},
        "model",
        "model_ema",
    ),
    "parameters alone": ({"model": OWN, "ema": {"shadow": PARAMETERS}}, "model", None),
    "a list of averages": (
        {"model": OWN, "ema": AS_LIST},
        "model",
        None,
    ),
    "deeper": ({"run": {"net": OWN, "ema": {"shadow_params": AS_LIST}}}, "run.net", None),
    "a pickled average": ({"model": OWN, "swa_model": NAMESPACE}, "model", None),
    "two keys": ({"model": OWN, "net": OTHER}, "model", "net"),
    "keys that nobody knows": ({"first": OWN, "second": OTHER}, "first", "second"),
    "best": ({"state_dict": OWN, "best_state_dict": OTHER}, "state_dict", "best_state_dict"),
    "a distiller": (behind("student.", OWN) | behind("teacher.", OTHER), "student", "teacher"),
    "mdistiller": (
        {"model": behind("module.student.", OWN) | behind("module.teacher.", DEEPER)},
        "student",
        None,
    ),
    "Lightning": (
        {"state_dict": behind("model.", OWN) | behind("ema_model.", OTHER)},
        "model",
        "ema_model",
    ),
    "a layer before it": (
        {"state_dict": behind("1.", OWN) | {"0.mean": np.ones(1, "f4")}},
        "1",
        None,
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_weights_are_named_and_one_is_chosen(tmp_path, name):
    value, first, second = SEVERAL[name]
    path = save(tmp_path / "w.pth", value)
    with pytest.raises(WeightsError, match=r"w\.pth holds several weights, under") as caught:
        load_variables(path, NETWORK)
    for label in filter(None, (first, second, "FILE#")):
        assert label in str(caught.value)
    same(load_variables(f"{path}#{first}", NETWORK), OWN)
    if second:
        same(load_variables(f"{path}#{second}", NETWORK), OTHER)
        assert read_bytes(f"{path}#{first}") != read_bytes(f"{path}#{second}")
    with pytest.raises(WeightsError, match="no weights under 'none': expected one of"):
        load_variables(f"{path}#none", NETWORK)


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".pth"])
def test_wrappers_in_other_files(tmp_path, ending):
    path = tmp_path / f"w{ending}"
    write_state_dict(path, behind("module.student.", OWN) | behind("module.teacher.", OTHER))
    with pytest.raises(WeightsError, match="under module.student, module.teacher"):
        load_variables(path, NETWORK)
    same(load_variables(f"{path}#teacher", NETWORK), OTHER)


def test_a_name_with_the_mark_in_it_is_a_file(tmp_path):
    save(tmp_path / "w#model.pth", {"model": OWN})
    same(load_variables(tmp_path / "w#model.pth", NETWORK), OWN)
    with pytest.raises(WeightsError, match="none#model does not exist"):
        load_variables(tmp_path / "none#model", NETWORK)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_integers_are_no_weights(tmp_path, dtype):
    path = tmp_path / "w.npz"
    write_state_dict(path, OWN | {"fc.weight": np.round(9 * OWN["fc.weight"]).astype(dtype)})
    with pytest.raises(WeightsError, match=f"fc.weight is {dtype}, expected floating-point"):
        load_variables(path, NETWORK)


def test_the_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_state_dict("~/w.npz", OWN)
    assert (tmp_path / "w.npz").exists()
    same(load_variables("~/w.npz", NETWORK), OWN)
    assert read_bytes("~/w.npz") == (tmp_path / "w.npz").read_bytes()
    with pytest.raises(WeightsError, match=f"{tmp_path}/none.npz does not exist"):
        read_state_dict("~/none.npz")


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("", "evolving"), ("module.", "evolving"), ("", "one3"), ("module.", "dks")],
)
def test_the_whole_of_a_network_with_branches_serves_as_its_backbone(tmp_path, prefix, kind):
    whole = build(f"{kind}:resnet8", 4, SHAPE)
    variables = jax.device_get(whole.init(jax.random.key(0)))
    state = to_state_dict(variables)
    path = save(tmp_path / "final_state.pth", behind(prefix, state))
    found = to_state_dict(load_variables(path, NETWORK))
    assert found.keys() < state.keys()
    assert all(np.array_equal(array, state[name]) for name, array in found.items())
    again = load_variables(path, whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, dict(variables)))
    save(path, behind(prefix, state | {"fc_b9.weight": np.ones((4, 64), "f4")}))
    with pytest.raises(WeightsError, match="unexpected fc_b9.weight"):
        load_variables(path, NETWORK)


def test_a_vgg_with_torchvisions_names(tmp_path):
    network = build("cifar_vgg16", 10, (32, 32, 3))
    variables = jax.device_get(network.init(jax.random.key(0)))
    state, theirs, index = to_state_dict(variables), {}, 0
    for block, count in enumerate((2, 2, 3, 3, 3)):
        for i in range(count):
            conv = f"conv{i + 1}" if block == 0 else f"layer{block}.{3 * i}"
            norm = f"bn{i + 1}" if block == 0 else f"layer{block}.{3 * i + 1}"
            for module, place in ((conv, index), (norm, index + 1)):
                leaves = {k: v for k, v in state.items() if k.rpartition(".")[0] == module}
                theirs |= {f"features.{place}.{k.rpartition('.')[2]}": v for k, v in leaves.items()}
            index += 3
        index += 1
    for ours, place in ((0, 0), (2, 3), (4, 6)):
        for leaf in ("weight", "bias"):
            theirs[f"classifier.{place}.{leaf}"] = state[f"classifier.{ours}.{leaf}"]
    assert len(theirs) == len(state)
    write_state_dict(tmp_path / "w.npz", theirs)
    found = load_variables(tmp_path / "w.npz", network)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, dict(variables)))


REPDISTILLER = pathlib.Path(__file__).parents[1] / "golden" / "zoo"


@pytest.mark.parametrize("path", sorted(REPDISTILLER.iterdir()), ids=lambda path: path.stem)
def test_the_networks_of_repdistiller_by_its_names(tmp_path, path):
    with np.load(path) as case:
        meta = json.loads(str(case["meta"]))
    network = build(network_name(meta["name"]), meta["classes"], (32, 32, 3))
    state = golden.state_dict(meta["state"], meta["seed"])
    write_state_dict(tmp_path / "w.pth", behind("module.student.", state))
    same(load_variables(tmp_path / "w.pth", network), state)


def test_the_resnet_50_of_repdistiller_by_its_names(tmp_path):
    network, rng = build("resnet50_cifar", 2, (32, 32, 3)), np.random.default_rng(0)
    values = {name: np.full(shape, rng.normal(), "f2") for name, shape in entries(network)}
    theirs = {
        name.replace("downsample", "shortcut").replace("fc.", "linear."): array
        for name, array in values.items()
    }
    assert {"layer1.0.shortcut.1.running_var", "linear.bias"} < theirs.keys()
    write_state_dict(tmp_path / "w.pth", theirs)
    same(load_variables(tmp_path / "w.pth", network), values)


def numbered_layers(blocks, convolutions):
    """Names in weiaicunzai's pytorch-cifar100 of a ResNet's layers -> ours."""
    names = {"conv1.0": "conv1", "conv1.1": "bn1", "fc": "fc"}
    for stage, count in enumerate(blocks):
        for block in range(count):
            theirs, ours = f"conv{stage + 2}_x.{block}", f"layer{stage + 1}.{block}"
            for i in range(convolutions):
                names[f"{theirs}.residual_function.{3 * i}"] = f"{ours}.conv{i + 1}"
                names[f"{theirs}.residual_function.{3 * i + 1}"] = f"{ours}.bn{i + 1}"
        if stage or convolutions == 3:
            for i in range(2):
                names[f"conv{stage + 2}_x.0.shortcut.{i}"] = f"layer{stage + 1}.0.downsample.{i}"
    return names


@pytest.mark.parametrize(
    ("name", "blocks", "convolutions"),
    [("cifar_resnet18", (2, 2, 2, 2), 2), ("cifar_resnet50", (3, 4, 6, 3), 3)],
)
def test_a_resnet_with_the_names_of_pytorch_cifar100(tmp_path, name, blocks, convolutions):
    network, state = build(name, 10, (32, 32, 3)), {}
    shapes = dict(entries(network))
    for place, (theirs, ours) in enumerate(numbered_layers(blocks, convolutions).items()):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if f"{ours}.{leaf}" in shapes:
                array = np.full(shapes[f"{ours}.{leaf}"], place + len(leaf) / 100, np.float16)
                state[f"{theirs}.{leaf}"] = array
        if f"{ours}.running_var" in shapes:
            state[f"{theirs}.num_batches_tracked"] = np.array(3)
    path = tmp_path / f"{name}-200-best.pth"
    save(path, behind("module.", state))
    found = to_state_dict(load_variables(path, network))
    assert found.keys() == shapes.keys()
    for theirs, ours in numbered_layers(blocks, convolutions).items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if f"{ours}.{leaf}" in shapes:
                expected = np.float32(state[f"{theirs}.{leaf}"])
                np.testing.assert_array_equal(found[f"{ours}.{leaf}"], expected)
    # Of their other ResNet with these stages each block's output is scaled.
    save(path, {k.replace("residual_function", "residual"): v for k, v in state.items()})
    with pytest.raises(WeightsError, match=f"not those of {name}"):
        load_variables(path, network)


def test_a_run_takes_what_is_chosen(tmp_path):
    config = {
        "dataset": {"name": "synthetic:8x8x1:4:64:32", "valid_fraction": 0.5},
        "networks": ("resnet8", "plane2"),
        "students": ("resnet8", "plane2"),
        "guidance": ("direct",),
        "recipe": {"epochs": 1, "batch_size": 16},
    }
    path = tmp_path / "w.ckpt"
    save(path, {"state_dict": OWN, "state_dict_ema": OTHER, "args": NAMESPACE})
    with pytest.raises(distill_jax.ConfigError, match="under state_dict, state_dict_ema"):
        distill_jax.run(config | {"teacher_weights": str(path)})
    stages = set()
    for choice, state in (("state_dict", OWN), ("state_dict_ema", OTHER)):
        results = distill_jax.run(
            config | {"teacher_weights": f"{path}#{choice}"}, workdir=tmp_path / "run"
        )
        same(results.networks["direct", "resnet8", 0][1], state)
        stages.add(results.rows[0]["stage"])
    assert len(stages) == 2


def test_save_and_load_of_a_name_without_a_known_ending(tmp_path):
    variables = load_variables(save(tmp_path / "w", OWN), NETWORK)
    save_variables(tmp_path / "w.npz", variables)
    os.replace(tmp_path / "w.npz", tmp_path / "w,acc=0.9")
    same(load_variables(tmp_path / "w,acc=0.9", NETWORK), OWN)
