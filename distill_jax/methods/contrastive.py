"""CRD: embeddings of student and teacher, told apart from those that a memory holds of others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distill_jax import rng
from distill_jax.methods import features, ranges
from distill_jax.methods.base import Context, Method, Shapes, Term
from distill_jax.methods.correlation import Embedding
from distill_jax.models import Outputs

EPSILON = 1e-7
_LARGEST = np.uint32(2**32 - 1)


class Memory(NamedTuple):
    """What is kept of one teacher's edge; `student` and `teacher` have a row an example.

    Args:
      student: (N, D) embeddings of the student, of unit length once written.
      teacher: (N, D) those of the teacher.
      log_z: (2,) log Z of the student's scores and of the teacher's.
      fixed: () whether they are known yet.
    """

    student: Array
    teacher: Array
    log_z: Array
    fixed: Array


@dataclasses.dataclass(frozen=True)
class CRD(Method):
    """Σ_k keep_k (L(u_k, teacher's memory) + L(w_k, student's memory)), both of unit length.

    u_k embeds the student's vector before the classifier and w_k the teacher's; both linear layers
    are trained with the student. Of an example y and K negatives j, drawn anew at each step without
    replacement from the examples of other classes,

      L(x, M) = -log o_y / (o_y + c + ε) - Σ_j log c / (o_j + c + ε),  o_j = exp(M_j·x / τ) / Z,

    with c = K/N and Z = N mean(o Z) over the first batch, fixed from then on. After it is read, M_y
    becomes m M_y + (1-m) x at unit length. The usual weight is 0.8.

    K is `negatives`, or N less the largest class where that is fewer: each class has as many. All
    teachers see the same negatives. A teacher that is dropped for a mini-batch leaves both of its
    memories and its Z as they were; they are of the batches that it taught.

    A teacher's memory takes 2 N D numbers, 51 MB for N = 50 000 and D = 128, and is replicated on
    every device. A step compares its B examples with all N rows, in a few arrays of B N numbers:
    the rows of K negatives would be B K D numbers, and slower to gather on a CPU.

    The authors' code divides by zero where an embedding is zero and overflows for a small τ; here
    zero passes no gradient and scores stay logarithms. It draws with replacement where K is more
    than there are.

    Args:
      embedding_size: D.
      negatives: K at most.
      temperature: τ.
      momentum: m in [0, 1].

    References:
      Tian et al., Contrastive Representation Distillation, ICLR 2020, 1910.10699, and its authors'
      code with "exact" negatives, whose numbers are the defaults.
    """

    embedding_size: int = 128
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5

    needs: ClassVar[tuple[str, ...]] = ("feature",)

    def __post_init__(self) -> None:
        ranges.counts("crd", embedding_size=self.embedding_size, negatives=self.negatives)
        ranges.above_zero("crd", temperature=self.temperature)
        ranges.share("crd", momentum=self.momentum)

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where a network shows no vector, or no example has another class."""
        features.check_vectors("crd", shapes)
        if shapes.labels is None:
            raise ValueError("crd draws examples of other classes: expected the labels of all")
        if not _most(shapes.labels):
            raise ValueError(
                f"crd draws examples of other classes: all {shapes.examples} have the same"
            )

    def warnings(self, shapes: Shapes) -> list[str]:
        """A line where fewer negatives are drawn than asked for."""
        most = _most(shapes.labels)
        if self.negatives <= most:
            return []
        return [
            f"crd draws {most} negatives an example, not {self.negatives}: of {shapes.examples} "
            f"training examples no more are of another class than the largest"
        ]

    def init(self, key: Array, shapes: Shapes) -> dict[str, Any]:
        """{"params": embeddings, "memory": `Memory`} by teacher, and the labels of the "split"."""
        module, bound = self._embedding, 1 / math.sqrt(self.embedding_size / 3)

        def embedding(key: Array, outputs: Outputs) -> Any:
            return module.init(key, jnp.zeros((1, outputs.feature.shape[1])))["params"]

        def bank(key: Array) -> Array:
            size = shapes.examples, self.embedding_size
            return jax.random.uniform(key, size, minval=-bound, maxval=bound)

        params, memory = {}, {}
        for k, teacher in enumerate(shapes.teachers):
            keys = jax.random.split(jax.random.fold_in(key, k), 4)
            own, theirs = embedding(keys[0], shapes.student), embedding(keys[1], teacher)
            params[str(k)] = {"student": own, "teacher": theirs}
            fresh = Memory(bank(keys[2]), bank(keys[3]), jnp.zeros(2), jnp.zeros((), bool))
            memory[str(k)] = fresh._asdict()
        numbers = {"labels": shapes.labels, "most": _most(shapes.labels)}
        split = {name: jnp.asarray(x, jnp.int32) for name, x in numbers.items()}
        return {"params": params, "memory": memory, "split": split}

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{"crd"}."""
        drawn, after = self.draw(variables["split"], context), {}

        def contrast(k: int, teacher: Outputs) -> Array:
            embedded = self.embed(variables["params"][str(k)], context.student, teacher)
            memory = Memory(**variables["memory"][str(k)])
            value, memory = self.contrast(
                *embedded, memory, drawn, context, context.teacher_mask[k]
            )
            after[str(k)] = memory._asdict()
            return value

        value = context.over_teachers(contrast)
        return {"crd": Term(value)}, {**variables, "memory": after}

    @property
    def _embedding(self) -> Embedding:
        return Embedding(self.embedding_size, normalised=True)

    def embed(self, params: Any, student: Outputs, teacher: Outputs) -> tuple[Array, Array]:
        """(B, D) of the student and of the teacher, by the embeddings of one edge."""
        apply: Any = self._embedding.apply
        own = apply({"params": params["student"]}, features.vector(student))
        return own, apply({"params": params["teacher"]}, features.vector(teacher))

    def draw(self, split: dict[str, Array], context: Context) -> Array:
        """(B, N) how often each example of the split is among the negatives of each of the batch.

        They are those with the smallest of N random numbers.
        """
        assert context.key is not None and context.position is not None
        others = split["labels"][None] != context.labels[:, None]
        keys = rng.per_example(context.key, context.position)
        numbers = jax.vmap(lambda key: jax.random.bits(key, others.shape[1:], jnp.uint32))(keys)
        ranked = jnp.sort(jnp.where(others, numbers, _LARGEST), -1)
        last = jnp.minimum(split["most"], self.negatives) - 1
        return others & (numbers <= ranked[:, last][:, None])

    def contrast(
        self,
        own: Array,
        theirs: Array,
        memory: Memory,
        drawn: Array,
        context: Context,
        kept: Array | bool = True,
    ) -> tuple[Array, Memory]:
        """The loss of one edge, and the memory after it: a function of what is drawn.

        Args:
          own: (B, D) embeddings of the student.
          theirs: (B, D) of the teacher.
          memory: of the edge.
          drawn: (B, N), see `draw`.
          context: gives `index` and `whole_batch`.
          kept: () whether the teacher teaches this mini-batch.

        Returns:
          (B,) values; the memory, which is the same one where the teacher does not.
        """
        counts, index = drawn.astype(own.dtype), context.index
        assert index is not None
        scores = [
            _scores(x, bank, index, self.temperature)
            for x, bank in ((own, memory.teacher), (theirs, memory.student))
        ]
        first = jnp.stack([_log_z(*pair, counts, context.whole_batch) for pair in scores])
        log_z = jnp.where(memory.fixed, memory.log_z, first.astype(memory.log_z.dtype))
        losses = [_loss(*pair, counts, log_z[i]) for i, pair in enumerate(scores)]
        places = context.whole_batch(index)

        def write(bank: Array, x: Array) -> Array:
            former, new = bank[places], context.whole_batch(lax.stop_gradient(x))
            rows = features.unit(self.momentum * former + (1 - self.momentum) * new)
            return bank.at[places].set(jnp.where(kept, rows, former).astype(bank.dtype))

        after = Memory(
            write(memory.student, own),
            write(memory.teacher, theirs),
            jnp.where(kept, log_z, memory.log_z),
            memory.fixed | kept,
        )
        return losses[0] + losses[1], after


def _most(labels: Any) -> int:
    """How many negatives every example can have: N less the largest class."""
    return len(labels) - int(np.bincount(labels).max())


def _scores(x: Array, bank: Array, index: Array, temperature: float) -> tuple[Array, Array]:
    """log o Z of each example with its own row (B,), and with all rows (B, N)."""
    everything = jnp.dot(x, bank.T, precision=lax.Precision.HIGHEST)
    return jnp.sum(x * bank[index], -1) / temperature, everything / temperature


def _log_z(
    positive: Array, everything: Array, counts: Array, whole_batch: Callable[[Array], Array]
) -> Array:
    """log (N mean o Z) over the positives and negatives of the whole batch, without gradient."""
    positive, everything = lax.stop_gradient((positive, everything))
    negatives = jax.nn.logsumexp(everything, axis=-1, b=counts)
    sums = whole_batch(jnp.logaddexp(positive, negatives))
    number = jnp.sum(whole_batch(1 + jnp.sum(counts, -1)))
    return jax.nn.logsumexp(sums) + jnp.log(everything.shape[-1] / number)


def _loss(positive: Array, everything: Array, counts: Array, log_z: Array) -> Array:
    """(B,) -log o_y / (o_y + c + ε) - Σ_j log c / (o_j + c + ε), from log o Z."""
    number, examples = jnp.sum(counts, -1), counts.shape[-1]
    threshold = jnp.log(number / examples + EPSILON) + log_z
    told_apart = jax.nn.softplus(threshold - positive)
    mistaken = jnp.sum(counts * jax.nn.softplus(everything - threshold[:, None]), -1)
    # log (c + ε) / c, of each negative.
    rest = number * jnp.log1p(EPSILON * examples / jnp.maximum(number, 1))
    return told_apart + mistaken + rest
