"""Classifiers of token sequences: a transformer encoder and a bidirectional LSTM.

Token 0 pads on the right, and nothing depends on how many of it there are.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax.models.indices import Indices

PAD = 0
HEAD_WIDTH = 32  # numbers of a transformer's head of attention
DROPOUT = 0.1
EMBEDDING = nn.initializers.normal(0.02)


class Transformer(nn.Module):
    """A pre-norm encoder with learned positions; the mean over the tokens is classified.

    Args:
      layers: L.
      width: D; the heads of attention have `HEAD_WIDTH` of it each.
      classes: C.
      dtype: of the computation.

    References:
      Vaswani et al., Attention Is All You Need, NeurIPS 2017, 1706.03762; with the normalisation
      before each sublayer, Xiong et al., On Layer Normalization in the Transformer Architecture,
      ICML 2020, 2002.04745.
    """

    layers: int
    width: int
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Indices, train: bool = False) -> Array:
        """The logits (B, C) of tokens (B, T)."""
        ids, wide = tokens.values, _wide(self.dtype)
        there = ids != PAD
        table = {"dtype": self.dtype, "param_dtype": wide, "embedding_init": EMBEDDING}
        x = nn.Embed(tokens.size, self.width, **table, name="embedding")(ids)
        places = nn.Embed(ids.shape[1], self.width, **table, name="positions")
        x = _dropout(x + places(jnp.arange(ids.shape[1]))[None], train)
        for i in range(self.layers):
            x = Layer(self.width, self.dtype, name=f"layer_{i}")(x, there, train)
        x = _mean(nn.LayerNorm(dtype=self.dtype, param_dtype=wide, name="norm")(x), there)
        return _classifier(self.classes, self.dtype)(_dropout(x, train))


class Layer(nn.Module):
    """Self-attention and two dense layers, each with a residual connection."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, there: Array, train: bool) -> Array:
        """(B, T, D) -> (B, T, D); tokens that are not `there` (B, T) are not attended to."""
        types = {"dtype": self.dtype, "param_dtype": _wide(self.dtype)}
        normed = nn.LayerNorm(**types, name="attention_norm")(x)
        heads = max(1, self.width // HEAD_WIDTH)
        attention = nn.MultiHeadDotProductAttention(heads, **types, name="attention")
        x += _dropout(attention(normed, mask=there[:, None, None, :]), train)
        normed = nn.LayerNorm(**types, name="dense_norm")(x)
        hidden = nn.gelu(nn.Dense(4 * self.width, **types, name="dense_in")(normed))
        return x + _dropout(nn.Dense(self.width, **types, name="dense_out")(hidden), train)


class BiLSTM(nn.Module):
    """An LSTM in each direction; the largest of their outputs over the tokens is classified.

    Args:
      width: D, of the embedding and of each direction.
      classes: C.
      dtype: of the computation.

    References:
      Conneau et al., Supervised Learning of Universal Sentence Representations, EMNLP 2017,
      1705.02364.
    """

    width: int
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Indices, train: bool = False) -> Array:
        """The logits (B, C) of tokens (B, T)."""
        types = {"dtype": self.dtype, "param_dtype": _wide(self.dtype)}
        there = tokens.values != PAD
        embed = nn.Embed(
            tokens.size, self.width, **types, embedding_init=EMBEDDING, name="embedding"
        )
        x = _dropout(embed(tokens.values), train)
        ahead, back = (
            nn.RNN(nn.OptimizedLSTMCell(self.width, **types, name=f"{name}_cell"), name=name)
            for name in ("forward", "backward")
        )
        lengths = jnp.sum(there, -1, dtype=jnp.int32)
        both: Any = nn.Bidirectional(ahead, back, name="lstm")(x, seq_lengths=lengths)
        x = both.astype(self.dtype)  # what the cells remember is as wide as their parameters
        lowest = jnp.finfo(x.dtype).min
        x = jnp.max(jnp.where(there[..., None], x, lowest), 1)
        return _classifier(self.classes, self.dtype)(_dropout(x, train))


def _wide(dtype: Any) -> Any:
    """The type of parameters."""
    return jnp.promote_types(dtype, jnp.float32)


def _classifier(classes: int, dtype: Any) -> nn.Module:
    return nn.Dense(classes, dtype=dtype, param_dtype=_wide(dtype), name="classifier")


def _dropout(x: Array, train: bool) -> Array:
    return nn.Dropout(DROPOUT, deterministic=not train)(x)


def _mean(x: Array, there: Array) -> Array:
    """The mean (B, D) of those of x (B, T, D) that are `there` (B, T)."""
    count = jnp.maximum(jnp.sum(there, 1, keepdims=True), 1)
    return jnp.sum(jnp.where(there[..., None], x, 0), 1) / count.astype(x.dtype)


def build_transformer(layers: int, width: int, classes: int, dtype: Any) -> Transformer:
    """The transformer of L layers of width D; ValueError where heads do not divide D."""
    if width > HEAD_WIDTH and width % HEAD_WIDTH:
        raise ValueError(
            f"transformer_{layers}_{width} has width {width}: expected a multiple of {HEAD_WIDTH}, "
            "the width of a head of attention, or less"
        )
    return Transformer(layers, width, classes, dtype)
