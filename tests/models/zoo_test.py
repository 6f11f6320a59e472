"""Networks by name: sizes, shapes, names of weights, folding, pools and resizes, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from marks import slow
from random_variables import random_variables

from distill_jax import models
from distill_jax.interop import torch_weights
from distill_jax.models.basics import Mode
from distill_jax.models.kernels.batch_norm import BatchNorm
from distill_jax.models.kernels.pools import max_pool_overlapping, resize_bilinear
from distill_jax.models.zoo.layers import Conv, conv_norm

# Counted from the authors' definitions, or published with them, at these numbers of classes.
PARAMETERS = {
    100: {
        "plane2": 215_172,
        "plane3": 438_596,
        "plane4": 475_652,
        "plane5": 959_364,
        "plane6": 1_107_204,
        "plane7": 655_684,
        "plane8": 1_246_276,
        "plane9": 2_340_868,
        "plane10": 2_931_460,
        "resnet8": 83_892,
        "resnet14": 181_108,
        "resnet20": 278_324,
        "resnet26": 375_540,
        "resnet32": 472_756,
        "resnet44": 667_188,
        "resnet56": 861_620,
        "resnet110": 1_736_564,
        "resnet8x4": 1_233_540,
        "resnet32x4": 7_433_860,
        "wrn_16_2": 703_284,
        "wrn_40_1": 569_780,
        "wrn_40_2": 2_255_156,
        "wrn_28_10": 36_536_884,
        "vgg8": 3_965_028,
        "vgg13": 9_462_180,
        "mobilenetv2": 812_836,
        "shufflenetv1": 949_258,
        "shufflenetv2": 1_355_528,
        "resnet50_cifar": 23_705_252,
        "cifar_resnet18": 11_220_132,
        "cifar_resnet34": 21_328_292,
        "cifar_resnext18": 22_209_444,
        "cifar_senet18": 11_314_012,
        "cifar_vgg16": 15_299_748,
        "cifar_vgg19": 20_612_004,
    },
    10: {
        "plane2": 13_082,
        "plane4": 37_338,
        "plane6": 82_778,
        "plane8": 327_962,
        "plane10": 2_487_850,
        "resnet8": 78_042,
        "resnet20": 272_474,
    },
    1000: {
        "imagenet_resnet18": 11_689_512,
        "imagenet_resnet34": 21_797_672,
        "imagenet_resnet50": 25_557_032,
    },
}
COUNTS = [(name, c, count) for c, counts in PARAMETERS.items() for name, count in counts.items()]


def image_size(name):
    return 224 if "imagenet" in name else 32


def abstract(network, images=2, train=False):
    """Shapes of the variables and of the outputs, with nothing computed."""
    variables = jax.eval_shape(network.init, jax.random.key(0))
    shape = jax.ShapeDtypeStruct((images, *network.image_shape), jnp.float32)
    return variables, jax.eval_shape(
        lambda v, x: network.apply(v, x, train=train)[0], variables, shape
    )


SMALLEST = [family.name(min(family.sizes)) for family in models.FAMILIES]
COUNTED = [*SMALLEST, "shufflenetv2", "plane4", "resnet20", "wrn_16_2", "imagenet_resnet50"]


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        *(case for case in COUNTS if case[0] in COUNTED),
        *slow(*(case for case in COUNTS if case[0] not in COUNTED)),
    ],
)
def test_parameter_count(name, classes, count):
    network = models.build(name, classes, (image_size(name),) * 2 + (3,))
    assert models.count_parameters(network) == count


def test_names_are_of_one_family_each():
    for name in models.MODELS:
        assert sum(family.size(name) is not None for family in models.FAMILIES) == 1
        models.check_name(name)


@pytest.mark.parametrize("name", [*SMALLEST, "plane10", "vgg19"])
def test_forward_shapes(name):
    network = models.build(name, 7, (image_size(name),) * 2 + (3,))
    _, outputs = abstract(network)
    assert outputs.logits.shape == (2, 7)
    assert outputs.logits.dtype == jnp.float32
    assert outputs.feature.shape[0] == 2 and outputs.feature.ndim == 2
    assert outputs.branches == ()
    sizes = [stage.shape[1] for stage in outputs.stages]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("name", "sizes", "widths"),
    [
        ("resnet8x4", (32, 16, 8), (64, 128, 256)),
        ("wrn_16_2", (32, 16, 8), (32, 64, 128)),
        ("vgg8", (16, 8, 4, 4), (128, 256, 512, 512)),
        ("mobilenetv2", (16, 8, 4, 2), (12, 16, 48, 160)),
        ("shufflenetv1", (16, 8, 4), (240, 480, 960)),
        ("shufflenetv2", (16, 8, 4), (116, 232, 464)),
        *slow(("cifar_senet50", (32, 16, 8, 4), (256, 512, 1024, 2048))),
        ("cifar_vgg16", (8, 4, 2, 1), (128, 256, 512, 512)),
        ("imagenet_resnet18", (56, 28, 14, 7), (64, 128, 256, 512)),
    ],
)
def test_stage_ends(name, sizes, widths):
    _, outputs = abstract(models.build(name, 10, (image_size(name),) * 2 + (3,)))
    assert tuple(stage.shape[1] for stage in outputs.stages) == sizes
    assert tuple(stage.shape[3] for stage in outputs.stages) == widths


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("wrn_16_2", {"block2.layer.0.convShortcut.weight": (64, 32, 1, 1), "bn1.weight": (128,)}),
        ("vgg13", {"block0.3.weight": (64, 64, 3, 3), "classifier.bias": (10,)}),
        (
            "cifar_resnext50",
            {"conv1.0.weight": (64, 3, 3, 3), "layer1.0.conv2.weight": (128, 4, 3, 3)},
        ),
        (
            "cifar_senet18",
            {
                "pre.0.bias": (64,),
                "stage2.0.residual.3.weight": (128, 128, 3, 3),
                "stage2.0.shortcut.0.bias": (128,),
                "stage2.0.excitation.0.weight": (8, 128),
            },
        ),
        ("cifar_vgg16", {"layer1.1.running_var": (128,), "classifier.4.weight": (10, 512)}),
        (
            "imagenet_resnet50",
            {"conv1.weight": (64, 3, 7, 7), "layer2.0.downsample.0.weight": (512, 256, 1, 1)},
        ),
    ],
)
def test_names_and_shapes_are_those_of_the_pytorch_state_dict(name, entries):
    network = models.build(name, 10, (32, 32, 3))
    shapes, _ = abstract(network)
    state = torch_weights.to_state_dict(jax.tree.map(lambda s: np.zeros(s.shape), shapes))
    for key, shape in entries.items():
        assert state[key].shape == shape


def test_sizes_by_rule():
    assert models.build("wrn_10_3", 10, (32, 32, 3)).module.blocks == (1, 1, 1)
    assert models.build("resnet14x2", 10, (32, 32, 3)).module.widths == (32, 32, 64, 128)
    models.check_name("wrn_22_4")
    models.check_name("evolving:wrn_22_4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg12", "did you mean 'vgg1"),
        ("wrn_17_2", "6n[+]4"),
        ("wrn_16_02", "unknown network"),
        ("resnet9x4", "6n[+]2"),
        ("resnet8x1", "two or more"),
        ("ResNet50", "did you mean 'resnet50_cifar'"),
        ("MobileNetV2", "did you mean 'mobilenetv2'"),
        ("shufflenetv3", "did you mean 'shufflenetv"),
        ("evolving:nothing", "evolving:NAME"),
        ("evolving:evolving:resnet8", "unknown network"),
        ("one:nothing", "one:NAME, okddip:NAME, byot:NAME, dks:NAME for each"),
        ("one:okddip:resnet8", "unknown network"),
        ("dks2:resnet8", "unknown network"),
        ("okddip0:resnet8", "unknown network"),
        ("three:resnet8", "unknown network"),
    ],
)
def test_illegal_names_say_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        models.check_name(name)
    with pytest.raises(ValueError, match=message):
        models.build(name, 10, (32, 32, 3))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vgg8", 7),
        ("cifar_vgg16", 28),
        ("plane10", 8),
        ("mobilenetv2", 15),
        ("shufflenetv1", 7),
        ("shufflenetv2", 7),
    ],
)
def test_images_too_small_for_the_network(name, size):
    with pytest.raises(ValueError, match="needs images of"):
        models.build(name, 10, (size, size, 3))


def test_networks_are_equal_and_hash_alike_when_built_twice():
    # they are static arguments of compiled functions
    for name in ("wrn_16_1", "cifar_resnet18", "evolving:cifar_vgg16"):
        one, two = (models.build(name, 10, (32, 32, 3)) for _ in range(2))
        assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_folded_batch_norm_equals_the_formula(use_bias, groups):
    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x, mode):
            conv = Conv(8, 3, stride=2, use_bias=use_bias, groups=groups, name="conv")
            return conv_norm(x, mode, conv, "norm", lambda y: resize_bilinear(y, (7, 9)))

    class Unfolded(nn.Module):
        @nn.compact
        def __call__(self, x, mode):
            conv = Conv(8, 3, stride=2, use_bias=use_bias, groups=groups, name="conv")
            return BatchNorm(8, name="norm")(resize_bilinear(conv(x, mode), (7, 9)), mode)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 8)), jnp.float32)
    shapes = jax.eval_shape(lambda k: Folded().init(k, x, Mode(train=True)), jax.random.key(1))
    variables = random_variables(shapes)
    folded = Folded().apply(variables, x, Mode())
    unfolded = Unfolded().apply(variables, x, Mode())
    np.testing.assert_allclose(folded, unfolded, rtol=1e-4, atol=1e-5)
    y = np.asarray(Unfolded().apply(variables, x, Mode(train=True), mutable="batch_stats")[0])
    assert np.abs(y - folded).max() > 0.1  # the batch's statistics are others


def test_strided_grouped_convolution_against_loops():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 5, 6, 4)), rng.normal(size=(3, 3, 2, 6))
    expected = np.zeros((1, 3, 3, 6))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j, o in np.ndindex(3, 3, 6):
        inputs = slice(0, 2) if o < 3 else slice(2, 4)
        patch = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, inputs]
        expected[0, i, j, o] = (patch * kernel[..., o]).sum()
    conv = Conv(6, 3, stride=2, use_bias=False, groups=2)
    variables = {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    np.testing.assert_allclose(
        conv.apply(variables, jnp.asarray(x, jnp.float32), Mode()), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [7, 8])
def test_overlapping_max_pool_and_its_gradient(size):
    rng = np.random.default_rng(0)
    x = rng.permutation(size * size * 2).reshape(1, size, size, 2).astype(np.float32) - 200
    out = (size - 1) // 2 + 1
    g = rng.normal(size=(1, out, out, 2)).astype(np.float32)
    expected, gradient = np.zeros_like(g), np.zeros_like(x)
    for i, j, c in np.ndindex(out, out, 2):
        rows = [r for r in range(2 * i - 1, 2 * i + 2) if 0 <= r < size]
        columns = [r for r in range(2 * j - 1, 2 * j + 2) if 0 <= r < size]
        row, column = max(((r, s) for r in rows for s in columns), key=lambda p: x[0, *p, c])
        expected[0, i, j, c] = x[0, row, column, c]
        gradient[0, row, column, c] += g[0, i, j, c]
    pooled, pull = jax.vjp(max_pool_overlapping, jnp.asarray(x))
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], gradient, rtol=1e-6)


def bilinear_by_hand(x, size):
    out = np.zeros((x.shape[0], *size, x.shape[3]))
    for i, j in np.ndindex(*size):
        r = i * (x.shape[1] - 1) / (size[0] - 1) if size[0] > 1 else 0.0
        s = j * (x.shape[2] - 1) / (size[1] - 1) if size[1] > 1 else 0.0
        r0, s0 = int(r), int(s)
        r1, s1 = min(r0 + 1, x.shape[1] - 1), min(s0 + 1, x.shape[2] - 1)
        top = x[:, r0, s0] * (1 - (s - s0)) + x[:, r0, s1] * (s - s0)
        bottom = x[:, r1, s0] * (1 - (s - s0)) + x[:, r1, s1] * (s - s0)
        out[:, i, j] = top * (1 - (r - r0)) + bottom * (r - r0)
    return out


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [((4, 4), (8, 8)), ((3, 5), (7, 9)), ((1, 1), (2, 2)), ((7, 7), (13, 7)), ((4, 3), (1, 2))],
)
def test_bilinear_resize_with_aligned_corners(inputs, outputs):
    x = np.random.default_rng(0).normal(size=(2, *inputs, 3)).astype(np.float32)
    resized = resize_bilinear(jnp.asarray(x), outputs)
    np.testing.assert_allclose(resized, bilinear_by_hand(x, outputs), rtol=1e-5, atol=1e-6)
    if min(outputs) > 1:
        np.testing.assert_allclose(resized[:, -1, -1], x[:, -1, -1], rtol=1e-6)


def test_resize_to_the_same_size_changes_nothing():
    x = jnp.arange(24.0).reshape(1, 2, 3, 4)
    np.testing.assert_array_equal(resize_bilinear(x, (2, 3)), x)


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_10_1", "vgg8"])
def test_bfloat16_is_near_float32(name):
    single, half = (models.build(name, 10, (16, 16, 3), dtype) for dtype in ("float32", "bfloat16"))
    variables = random_variables(jax.eval_shape(single.init, jax.random.key(0)))
    images = np.random.default_rng(1).normal(size=(4, 16, 16, 3)).astype(np.float32)
    exact, rough = (
        jax.jit(lambda v, x, n=n: n.apply(v, x)[0].logits)(variables, images)
        for n in (single, half)
    )
    assert exact.dtype == rough.dtype == jnp.float32
    error = np.abs(exact - rough).max() / np.abs(exact).max()
    assert 0 < error < 0.03


@pytest.mark.parametrize("name", ["cifar_senet18", "imagenet_resnet18", "evolving:cifar_resnet18"])
def test_bfloat16_stages_and_float32_logits(name):
    _, outputs = abstract(models.build(name, 10, (32, 32, 3), "bfloat16"), train=True)
    for part in (outputs, *outputs.branches):
        assert part.logits.dtype == jnp.float32
        assert all(stage.dtype == jnp.bfloat16 for stage in part.stages)


@pytest.mark.parametrize("name", ["plane2", "resnet8", "wrn_10_1", "vgg8", "evolving:plane4"])
def test_logits_and_their_gradients_are_computed_at_the_highest_precision(name):
    network = models.build(name, 10, (32, 32, 3), "bfloat16")

    def logits(variables, images):
        outputs, _ = network.apply(variables, images, train=True)
        return sum(one.logits.sum() for one in (outputs, *outputs.branches))

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    lowered = jax.jit(jax.value_and_grad(logits)).lower(network.shapes, images).as_text()
    products = [x for x in lowered.splitlines() if "dot_general" in x and "bf16" not in x]
    # The logits, and the gradients of kernel and feature.
    assert len(products) >= 3 * (network.branches + 1)
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize(
    ("name", "leaf", "std"),
    [
        ("cifar_resnet18", ("layer4.0", "conv1", "kernel"), (3 * 9 * 256) ** -0.5),
        ("cifar_resnext18", ("layer4.0", "conv1", "kernel"), (2 / (9 * 1024)) ** 0.5),
        ("imagenet_resnet18", ("layer4.0", "conv1", "kernel"), (2 / (9 * 512)) ** 0.5),
        ("cifar_vgg16", ("classifier.0", "kernel"), 0.01),
        ("wrn_16_2", ("block3.layer.0", "conv1", "kernel"), (2 / (9 * 128)) ** 0.5),
        ("mobilenetv2", ("blocks.6.0", "conv.3", "kernel"), (2 / (9 * 480)) ** 0.5),
        ("shufflenetv1", ("layer3.0", "conv3", "kernel"), (3 * 40) ** -0.5),
        ("resnet50_cifar", ("layer3.0", "conv2", "kernel"), (2 / (9 * 256)) ** 0.5),
    ],
)
def test_initialisation_is_that_of_the_published_code(name, leaf, std):
    """Draws one leaf alone: the network's other weights are dead code in the compiled function."""
    network = models.build(name, 10, (32, 32, 3))

    def draw(key):
        value = network.init(key)["params"]
        for part in leaf:
            value = value[part]
        return value

    assert np.std(jax.jit(draw)(jax.random.key(0))) == pytest.approx(std, rel=0.02)
