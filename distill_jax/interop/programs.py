"""A network with its weights as one program: StableHLO by `jax.export`, or ONNX by jax2onnx.

A program takes a batch of any size and gives float32 logits. Its convolutions are those that XLA
has on every platform, not the ones that are faster on a CPU alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from distill_jax.interop.torch_weights import WeightsError
from distill_jax.models import Network, Variables
from distill_jax.models.backend import traced_for
from distill_jax.refusals import kind_and_line

PLATFORMS = ("cpu", "cuda", "tpu")
_PLAIN = "gpu"  # the platform for which a network computes by nothing that others lack
Forward = Callable[[Any], Any]  # a batch -> float32 logits


def forward_of(
    network: Network, variables: Variables, preprocess: Callable[[Any], Any] | None = None
) -> Forward:
    """A function of a batch alone: (B, ...) -> logits (B, C) float32.

    Args:
      network: the network.
      variables: its own, which become constants of the program.
      preprocess: makes of a batch what the network sees; None where it is given that.
    """
    frozen = traced_for(_PLAIN, network.freeze)(variables)

    def forward(inputs):
        seen = inputs if preprocess is None else preprocess(inputs)
        return network.apply(frozen, seen)[0].logits.astype(jnp.float32)

    return traced_for(_PLAIN, forward)


def to_stablehlo(forward: Forward, spec: Any) -> bytes:
    """The program for `PLATFORMS` at once, which `from_stablehlo` and `jax.export` read.

    Args:
      forward: see `forward_of`.
      spec: shapes and types of a batch of one.

    Raises:
      WeightsError: the network takes no batch of any size.
    """
    program = export.export(jax.jit(forward), platforms=PLATFORMS)
    try:
        return bytes(program(_of_any_size(spec)).serialize())
    except Exception as error:  # whatever a network raises
        raise WeightsError(
            f"the network cannot be traced for a batch of any size: {kind_and_line(error)}"
        ) from error


def from_stablehlo(raw: bytes) -> tuple[Forward, Any]:
    """What `to_stablehlo` made, and the shapes and types of a batch of one.

    Raises:
      WeightsError: it is none, or is damaged.
    """
    try:
        program = export.deserialize(bytearray(raw))
        inputs = jax.tree.unflatten(program.in_tree, program.in_avals)[0][0]
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    except Exception as error:  # whatever the decoders raise
        raise WeightsError(
            f"is damaged, or no program of jax.export ({type(error).__name__})"
        ) from error
    return jax.jit(program.call), spec


def to_onnx(forward: Forward, spec: Any) -> bytes:
    """The program in ONNX, its one input and one output being arrays.

    Args:
      forward: see `forward_of`.
      spec: shape and type of a batch of one.

    Raises:
      WeightsError: jax2onnx is not installed, cannot convert an operation, or inputs are several.
    """
    if not isinstance(spec, jax.ShapeDtypeStruct):
        raise WeightsError("ONNX is written of networks that take one array: expected stablehlo")
    try:
        import jax2onnx
    except ImportError as error:
        raise WeightsError(
            f"ONNX needs jax2onnx ({error}): expected pip install 'distill_jax[onnx]'"
        ) from None
    try:
        model = jax2onnx.to_onnx(forward, inputs=[_of_any_size(spec)])
    except Exception as error:  # whatever a converter raises
        raise WeightsError(
            f"jax2onnx cannot convert the network: {kind_and_line(error)}"
        ) from error
    return model.SerializeToString()


def from_onnx(raw: bytes) -> tuple[Forward, Any]:
    """A model under onnxruntime on the CPU, and the shape and type of a batch of one.

    Raises:
      WeightsError: onnxruntime is not installed, or the model is damaged.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise WeightsError(
            f"ONNX needs onnxruntime ({error}): expected pip install 'distill_jax[onnx]'"
        ) from None
    try:
        session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise WeightsError(f"is damaged, or no ONNX model ({type(error).__name__})") from error
    (given,) = session.get_inputs()
    dtype = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}[given.type]

    def forward(inputs):
        return session.run(None, {given.name: np.asarray(inputs)})[0]

    return forward, jax.ShapeDtypeStruct((1, *given.shape[1:]), dtype)


def _of_any_size(spec: Any) -> Any:
    """Shapes and types of a batch of any size, from those of a batch of one."""
    (batch,) = export.symbolic_shape("batch")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), spec)
