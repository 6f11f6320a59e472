"""Factor transfer on maps that are given: the distance of factors, and the reconstruction."""

from __future__ import annotations

import re
from typing import Any

import jax
from flax import linen as nn

from distill_jax.methods import FT, adapters
from distill_jax.methods.factors import Encoder, Paraphraser
from distill_jax.models import Outputs, Variables
from experiments.parity.adapters import Places, to_torch, variables_of
from experiments.parity.features import context_of, loss_of
from experiments.parity.given import Arrays, Compute, Computed
from experiments.parity.losses import outputs

TRANSLATOR: Places = {
    f"{kind}{i}": ("0", f"{kind}{i}") for kind in ("conv", "bn") for i in range(3)
}
PARAPHRASER: Places = {
    **{f"conv{i}": ("0", "encoder", f"conv{i}") for i in range(3)},
    **{f"deconv{i}": ("0", f"deconv{i}") for i in range(3)},
}
_KINDS = {("encoder", 0): "conv", ("encoder", 1): "bn", ("decoder", 0): "deconv"}
_OPTIONS = {"k": "rate", "rate": "rate", "p1": "power", "p2": "order"}


def layer(name: str) -> str:
    """ "translator.encoder.4.weight", of the field's code, as the authors': "bn1.weight"."""
    _, own = name.split(".", 1)
    numbered = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(\w+)", own)
    if numbered is None:
        return own
    part, number, leaf = numbered.groups()
    i, within = divmod(int(number), 3)
    return f"{_KINDS[part, within]}{i}.{leaf}"


def mirrored(name: str, array: Any) -> Any:
    """A transposed convolution's kernel as that of a convolution, or back; others as they are."""
    transposed = layer(name).startswith("deconv") and array.ndim == 4
    return array.swapaxes(0, 1)[:, :, ::-1, ::-1] if transposed else array


def variables_from(state: Arrays, whose: str, places: Places) -> Variables:
    """Those of the "translator" or the "paraphraser" in a state dict."""
    own = {name: x for name, x in state.items() if name.startswith(f"{whose}.")}
    return variables_of({layer(name): mirrored(name, x) for name, x in own.items()}, places)


def state_of(variables: Variables, names: list[str], whose: str, places: Places) -> Arrays:
    """The state dict of a translator's or a paraphraser's variables, those of the `names` in it."""
    torch = to_torch(variables, places)
    named = {name: layer(name) for name in names if name.startswith(f"{whose}.")}
    return {name: mirrored(name, torch[own]) for name, own in named.items() if own in torch}


def encoders(paraphrasers: Variables) -> Variables:
    """What factor transfer keeps of paraphrasers."""
    return {k: own["encoder"] for k, own in paraphrasers["params"].items()}


def ft(numbers: dict[str, Any], inputs: Arrays, state: Arrays) -> Computed:
    """The distance of the factors, and the error of the paraphraser by the form's own measure."""
    names = list(state)
    norms = any("running" in name for name in names)
    options = {ours: numbers[theirs] for theirs, ours in _OPTIONS.items() if theirs in numbers}
    method = FT(form="attention" if norms else "factor", **options)
    student, teacher = (
        outputs(stages=(inputs[f"{who}_feature"],)) for who in ("student", "teacher")
    )
    paraphraser = variables_from(state, "paraphraser", PARAPHRASER)
    translator = variables_from(state, "translator", TRANSLATOR)
    variables = {**translator, "paraphraser": encoders(paraphraser)}
    error = loss_of(method.preparation(), student, teacher, paraphraser)
    losses = {"ft": loss_of(method, student, teacher, variables)}
    losses |= {f"paraphraser_{measure}": error for measure in ("mse", "l1")}
    if not norms:  # the authors' code shows nothing else
        return Computed(losses)
    context = context_of(student, teacher)
    _, after = method.terms(variables, context)
    buffers = {"batch_stats": after["batch_stats"]}

    def run(module: nn.Module, own: Variables, outputs: Outputs) -> jax.Array:
        return adapters.applied(module, own, outputs.stages[-1], context)[0]

    size = len(state["translator.encoder.6.bias"])
    out = {
        "factor_s": run(Encoder(size, norm=True), adapters.of_module(translator, "0"), student),
        "factor_t": run(Encoder(size), {"params": variables["paraphraser"]["0"]}, teacher),
        "reconstruction": run(Paraphraser(size), adapters.of_module(paraphraser, "0"), teacher),
    }
    return Computed(losses, state_of(buffers, names, "translator", TRANSLATOR), out=out)


FACTORS: dict[str, Compute] = {"ft": ft}
