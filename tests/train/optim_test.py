"""Schedules against the authors' formulas, and updates against PyTorch's rules in NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.methods import Hyper
from distill_jax.train import optim
from distill_jax.train.optim import OptimOptions

STEPS = 7  # of an epoch


def by_epoch(options, epochs, steps=STEPS):
    """The learning rates at the first and at the last step of each epoch."""
    schedule = optim.schedule(options, epochs, steps)
    # Of one length for all, so that little is compiled.
    first = steps * np.arange(200)
    ends = jnp.asarray(np.stack([first, first + steps - 1]))
    rates = np.broadcast_to(jax.vmap(jax.vmap(schedule))(ends), (2, 200))
    return rates[0, :epochs], rates[1, :epochs]


# What the papers and their codes do at an epoch, in their words.
def constant(rate, epoch, epochs):
    return rate


def takd_code(rate, epoch, epochs):
    # lr * 0.1 for three quarters, lr * 0.01 after: the full rate is never reached.
    return rate * 0.1 if epoch < 0.75 * epochs else rate * 0.01


def dgkd_code(rate, epoch, epochs):
    return rate * (1 if epoch < 0.5 * epochs else 0.1 if epoch < 0.75 * epochs else 0.01)


def takd_paper(rate, epoch, epochs):
    return rate * (1 if epoch < 80 else 0.1 if epoch < 120 else 0.01)


def teskd(rate, epoch, epochs):
    return rate * (1 if epoch < 100 else 0.1 if epoch < 150 else 0.01)


@pytest.mark.parametrize(
    ("values", "epochs", "formula"),
    [
        ({}, 5, constant),
        *[({"schedule": "takd_code"}, epochs, takd_code) for epochs in (160, 150, 8, 5, 2)],
        *[({"schedule": "piecewise"}, epochs, dgkd_code) for epochs in (160, 150, 30, 7, 3, 2, 1)],
        ({"schedule": "piecewise", "milestones": (80 / 150, 120 / 150)}, 150, takd_paper),
        ({"schedule": "piecewise", "milestones": (0.5, 0.75)}, 200, teskd),
    ],
)
@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_epochs_have_the_rates_of_papers_and_codes(values, epochs, formula, rate):
    want = [formula(rate, epoch, epochs) for epoch in range(epochs)]
    for got in by_epoch(OptimOptions(learning_rate=rate, **values), epochs):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.55, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("epochs", [10, 30, 100])
def test_a_milestone_on_an_epoch_is_that_epoch(fraction, epochs):
    options = OptimOptions(schedule="piecewise", milestones=(fraction,), decay=0.5)
    first, last = by_epoch(options, epochs, 2)
    want = np.where(np.arange(epochs) * 100 < round(fraction * 100) * epochs, 0.1, 0.05)
    np.testing.assert_allclose(first, want, rtol=1e-6)
    np.testing.assert_allclose(last, want, rtol=1e-6)


def test_milestones_that_fall_on_one_epoch_both_count():
    options = OptimOptions(schedule="piecewise", milestones=(0.45, 0.5), decay=0.1)
    np.testing.assert_allclose(by_epoch(options, 4)[0], [0.1, 0.1, 0.001, 0.001], rtol=1e-6)


def test_cosine_falls_from_the_rate_to_zero():
    epochs, options = 6, OptimOptions(schedule="cosine", learning_rate=0.3)
    at = np.arange(epochs) * STEPS / (epochs * STEPS)
    np.testing.assert_allclose(
        by_epoch(options, epochs)[0], 0.15 * (1 + np.cos(np.pi * at)), rtol=1e-5
    )
    assert optim.schedule(options, epochs, STEPS)(epochs * STEPS) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("kind", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [1.0, 2.5])
def test_warmup_scales_the_schedule_that_goes_on_below(kind, warmup):
    steps = jnp.arange(6 * STEPS)
    plain = jax.vmap(optim.schedule(OptimOptions(schedule=kind), 6, STEPS))(steps)
    options = OptimOptions(schedule=kind, warmup_epochs=warmup)
    warm = jax.vmap(optim.schedule(options, 6, STEPS))(steps)
    factor = np.minimum(1, np.arange(1, 6 * STEPS + 1) / (warmup * STEPS))
    np.testing.assert_allclose(warm, np.broadcast_to(plain, factor.shape) * factor, rtol=1e-5)
    assert warm[0] > 0


# ------------------------------------------------------------------------------------------ updates
RANDOM = np.random.RandomState(0)
PARAMS = {
    "network": {
        "conv": {"kernel": RANDOM.standard_normal((3, 2)), "bias": RANDOM.standard_normal(2)},
        "bn": {"scale": 1 + RANDOM.rand(2)},
    },
    "methods": {"fitnet": {"kernel": RANDOM.standard_normal((2, 2))}},
}
GRADS = [jax.tree.map(lambda p: RANDOM.standard_normal(p.shape), PARAMS) for _ in range(6)]
RATES = [0.1, 0.1, 0.03, 0.03, 0.01, 0.2]


def updated(options, weight_decay, see=lambda params: None):
    """PARAMS after all of GRADS, in one program for all rates and decays."""
    rates = jnp.asarray(RATES, jnp.float32)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def update(params, state, grads, step, hyper):
        rule = optim.transform(options, lambda step: rates[step], hyper, step)
        changes, state = rule.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    def hyper(weight_decay):
        return Hyper(jnp.float32(1.0), jnp.float32(weight_decay))

    params = jax.tree.map(jnp.float32, PARAMS)
    state = optim.transform(options, lambda step: 0.0, Hyper(), 0).init(params)
    for step, grads in enumerate(GRADS):
        grads = jax.tree.map(jnp.float32, grads)
        params, state = update(params, state, grads, jnp.int32(step), hyper(weight_decay))
        see(jax.device_get(params))
    update(params, state, grads, jnp.int32(0), hyper(0.7))
    return params


def without(options):
    """The options by which everything moves."""
    return dataclasses.replace(options, trainable=(), frozen=())


def torch_sgd(grads, p, *, momentum=0.9, nesterov=False, weight_decay=0.0):
    """torch.optim.SGD without dampening, one parameter."""
    velocity = np.zeros_like(p)
    for rate, g in zip(RATES, grads, strict=True):
        g = g + weight_decay * p
        velocity = momentum * velocity + g
        p = p - rate * (g + momentum * velocity if nesterov else velocity)
    return p


def adamw(grads, p, *, weight_decay=0.0, b1=0.9, b2=0.999, epsilon=1e-8):
    """Loshchilov and Hutter, decoupled decay scaled by the learning rate, one parameter."""
    first, second = np.zeros_like(p), np.zeros_like(p)
    for t, (rate, g) in enumerate(zip(RATES, grads, strict=True), 1):
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * g**2
        scaled = (first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + epsilon)
        p = p - rate * (scaled + weight_decay * p)
    return p


@pytest.mark.parametrize(
    ("values", "rule", "arguments"),
    [
        ({}, torch_sgd, {}),
        ({"momentum": 0.0}, torch_sgd, {"momentum": 0.0}),
        ({"momentum": 0.5}, torch_sgd, {"momentum": 0.5}),
        ({"nesterov": True}, torch_sgd, {"nesterov": True}),
        ({"optimizer": "adamw"}, adamw, {}),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_follow_the_rule_on_every_parameter(values, rule, arguments, weight_decay):
    params = updated(OptimOptions(**values), weight_decay)
    want = jax.tree.map(
        lambda p, *grads: rule(grads, p, weight_decay=weight_decay, **arguments), PARAMS, *GRADS
    )
    chex.assert_trees_all_close(params, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_clipping_scales_all_gradients_down_to_one_norm(nesterov):
    """The gradients of the network and of its methods count together."""
    norms = [np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads))) for grads in GRADS]
    limit = float(np.median(norms))
    assert min(norms) < limit < max(norms)  # some are clipped, others not
    clipped = [
        jax.tree.map(lambda g, norm=norm: g * min(1, limit / norm), grads)
        for grads, norm in zip(GRADS, norms, strict=True)
    ]
    params = updated(OptimOptions(clip_norm=limit, nesterov=nesterov), 0.1)
    want = jax.tree.map(
        lambda p, *grads: torch_sgd(grads, p, weight_decay=0.1, nesterov=nesterov), PARAMS, *clipped
    )
    chex.assert_trees_all_close(params, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 3])
def test_accumulated_gradients_make_one_update_of_their_mean(steps):
    seen = []
    params = updated(OptimOptions(accumulate_steps=steps), 0.1, seen.append)

    def by_hand(p, *grads):
        velocity, after = np.zeros_like(p), []
        for t, rate in enumerate(RATES, 1):
            if t % steps == 0:
                velocity = 0.9 * velocity + np.mean(grads[t - steps : t], 0) + 0.1 * p
                p = p - rate * velocity
            after.append(p)
        return np.stack(after)

    want = jax.tree.map(by_hand, PARAMS, *GRADS)
    found = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(seen[-1], params)
    chex.assert_trees_all_equal(seen[0], jax.tree.map(np.float32, PARAMS))


@pytest.mark.parametrize(
    ("values", "rule"), [({}, torch_sgd), ({"optimizer": "adamw"}, adamw)], ids=["sgd", "adamw"]
)
def test_decay_of_kernels_spares_every_vector(values, rule):
    params = updated(OptimOptions(decayed="kernels", **values), 0.3)
    want = jax.tree.map(
        lambda p, *grads: rule(grads, p, weight_decay=0.3 * (p.ndim > 1)), PARAMS, *GRADS
    )
    chex.assert_trees_all_close(params, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "moving"),
    [
        ({"trainable": ("conv.*",)}, {"conv.kernel", "conv.bias"}),
        ({"trainable": (r".*\.kernel", "bn.scale")}, {"conv.kernel", "bn.scale"}),
        ({"frozen": ("conv.*",)}, {"bn.scale"}),
        ({"trainable": ("conv.*",), "frozen": (".*bias",)}, {"conv.kernel"}),
        ({"trainable": ("conv.kernel",), "accumulate_steps": 2}, {"conv.kernel"}),
        ({"frozen": ("conv.kernel",), "decayed": "kernels"}, {"conv.bias", "bn.scale"}),
        ({"frozen": ("conv", "kernel", "fitnet.*", "onv.*")}, {"conv.kernel", "conv.bias"}),
    ],
)
def test_a_frozen_parameter_keeps_its_bytes_and_those_of_methods_always_train(values, moving):
    options, start = OptimOptions(**values), jax.tree.map(jnp.float32, PARAMS)
    params, free = updated(options, 0.3), updated(without(options), 0.3)
    for path in ("conv.kernel", "conv.bias", "bn.scale"):
        module, name = path.split(".")
        own, *others = (tree["network"][module][name] for tree in (params, start, free))
        if path in moving or "onv.*" in values.get("frozen", ()):
            np.testing.assert_array_equal(own, others[1])
        else:
            assert np.asarray(own).tobytes() == np.asarray(others[0]).tobytes()
            assert optim.moves(options, path) is False
    chex.assert_trees_all_equal(params["methods"], free["methods"])
    gap = np.abs(params["methods"]["fitnet"]["kernel"] - start["methods"]["fitnet"]["kernel"])
    assert gap.min() > 1e-3


def test_frozen_parameters_do_not_count_for_the_norm_that_is_clipped():
    grads = [{"network": {"conv": g["network"]["conv"]}, "methods": g["methods"]} for g in GRADS]
    limit = 0.5
    norms = [np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(one))) for one in grads]
    params = updated(OptimOptions(frozen=("bn.*",), clip_norm=limit, momentum=0.0), 0.0)
    kernel = PARAMS["network"]["conv"]["kernel"]
    for rate, norm, one in zip(RATES, norms, grads, strict=True):
        kernel = kernel - rate * min(1, limit / norm) * one["network"]["conv"]["kernel"]
    np.testing.assert_allclose(params["network"]["conv"]["kernel"], kernel, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------- a user's optimizers
@pytest.fixture
def registry(monkeypatch):
    """What is registered here is forgotten afterwards."""
    monkeypatch.setattr(optim, "_registered", {})


def lion_with_clipping(schedule, hyper):
    return optax.chain(
        optax.clip(0.7),
        optax.scale_by_lion(),
        optax.add_decayed_weights(hyper.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


@pytest.mark.parametrize("values", [{}, {"trainable": ("conv.*",)}])
def test_a_registered_optimizer_does_what_optax_does(registry, values):
    optim.register_optimizer("clipped_lion", lion_with_clipping)
    params = updated(OptimOptions("clipped_lion", **values), 0.3)
    rule = lion_with_clipping(lambda step: jnp.asarray(RATES)[step], Hyper(weight_decay=0.3))
    want = jax.tree.map(jnp.float32, PARAMS)
    state = rule.init(want)
    for grads in GRADS:
        changes, state = rule.update(jax.tree.map(jnp.float32, grads), state, want)
        want = optax.apply_updates(want, changes)
    if values:
        want["network"]["bn"] = jax.tree.map(jnp.float32, PARAMS["network"]["bn"])
    chex.assert_trees_all_close(params, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_schedule_of_a_registered_optimizer_is_that_of_the_steps(registry, steps):
    """An update of several steps has the rate of the last of them, as the library's have."""
    optim.register_optimizer("plain", lambda schedule, hyper: optax.sgd(schedule))
    params = updated(OptimOptions("plain", accumulate_steps=steps), 0.0)
    want = updated(OptimOptions(momentum=0.0, accumulate_steps=steps), 0.0)
    chex.assert_trees_all_close(params, want, rtol=1e-6, atol=1e-7)


def test_a_registered_optimizer_is_part_of_the_identity(registry):
    assert optim.identity_of("sgd") is None
    optim.register_optimizer("mine", lion_with_clipping, version="3")
    first = optim.identity_of("mine")
    assert first["name"] == "mine" and first["version"] == "3"
    optim.register_optimizer("mine", lambda schedule, hyper: optax.sgd(schedule), version="3")
    assert optim.identity_of("mine") != first


@pytest.mark.parametrize(
    ("name", "build", "message"),
    [
        ("my opt", optax.sgd, "identifier such as 'my_sgd', got 'my opt'"),
        (3, optax.sgd, "identifier such as 'my_sgd', got 3"),
        ("sgd", optax.sgd, "'sgd' is an optimizer of the library"),
        ("mine", optax.sgd(0.1), "expected a function .schedule, hyper."),
    ],
)
def test_optimizers_that_cannot_be_registered(registry, name, build, message):
    with pytest.raises(ValueError, match=message):
        optim.register_optimizer(name, build)
    with pytest.raises(ValueError, match="optimizer is one of .*'sgd', 'adamw'"):
        OptimOptions("mine")


@pytest.mark.parametrize("kind", optim.SCHEDULES)
def test_a_schedule_takes_a_traced_step(kind):
    schedule, traces = optim.schedule(OptimOptions(schedule=kind, warmup_epochs=1), 4, STEPS), []

    @jax.jit
    def rate(step):
        traces.append(step)
        return schedule(step)

    for step in (0, 5, 20, 27):
        np.testing.assert_allclose(rate(jnp.int32(step)), schedule(step), rtol=1e-5, atol=1e-8)
    assert len(traces) == 1


# --------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("optimizer", ["adam", ""]),
        ("decayed", ["vectors", ""]),
        ("accumulate_steps", [0, -1]),
        ("clip_norm", [-1.0, np.inf, np.nan]),
        ("trainable", [("(",), (3,)]),
        ("frozen", [("layer1.*", "[")]),
        ("schedule", ["step", ""]),
        ("learning_rate", [0.0, -0.1, np.inf, np.nan]),
        ("momentum", [-0.1, 1.0, np.nan]),
        ("weight_decay", [-1e-4, np.inf, np.nan]),
        ("warmup_epochs", [-1.0, np.inf, np.nan]),
        ("decay", [0.0, 1.5, np.nan]),
        ("milestones", [(0.5, 0.5), (0.7, 0.3), (0.0,), (1.0,), (80,), (np.nan,), ("a",)]),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=field):
            OptimOptions(**{field: value})


@pytest.mark.parametrize(
    "values",
    [
        {"momentum": 0.0, "weight_decay": 0.0},
        {"decay": 1.0},
        {"milestones": ()},
        {"milestones": (0.1, 0.2, 0.9)},
        {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 0.5},
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(values):
    options = OptimOptions(**values)
    assert {name: getattr(options, name) for name in values} == values
