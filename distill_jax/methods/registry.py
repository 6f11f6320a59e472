"""Methods by name: those that come with the library, and those that a user brings."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
from jax import Array

from distill_jax.identity import changed_fields, check_new_name, describe
from distill_jax.methods.attention import AT, NST
from distill_jax.methods.base import OUTPUTS, Context, Hyper, Method, Shapes, Term
from distill_jax.methods.boundary import BSS
from distill_jax.methods.byot import BYOT
from distill_jax.methods.ca_mkd import CAMKD
from distill_jax.methods.connectors import AB, SRRL
from distill_jax.methods.consistency import CSKD, DDGSD
from distill_jax.methods.contrastive import CRD
from distill_jax.methods.correlation import CC
from distill_jax.methods.curriculum import CTKD
from distill_jax.methods.decoupled import DKD, NKD
from distill_jax.methods.dml import DML, KDCL
from distill_jax.methods.factors import FT
from distill_jax.methods.fitnet import FitNet
from distill_jax.methods.flow import FSP, KDSVD
from distill_jax.methods.frskd import FRSKD
from distill_jax.methods.kd import KD, CrossEntropy
from distill_jax.methods.logits import DIST, WTTM, MSELogits
from distill_jax.methods.norms import L2, N3
from distill_jax.methods.peers import ONE, OKDDip
from distill_jax.methods.progressive import PSKD
from distill_jax.methods.relations import PKT, RKD, SP
from distill_jax.methods.review import ReviewKD
from distill_jax.methods.scaling import NormKD
from distill_jax.methods.semantic import SemCKD
from distill_jax.methods.several import AEKD, AVER, EBKD
from distill_jax.methods.smoothing import LabelSmoothing, TfKDReg, TfKDSelf
from distill_jax.methods.synergy import DCM, DKS
from distill_jax.methods.teskd import TESKD
from distill_jax.methods.variational import VID
from distill_jax.models import Outputs

# (student, teacher, labels, hyper) -> (B,)
EdgeLoss = Callable[[Outputs, Outputs, Array, Hyper], Array]

METHODS: dict[str, type[Method]] = {
    "ce": CrossEntropy,
    "kd": KD,
    "dml": DML,
    "teskd": TESKD,
    "fitnet": FitNet,
    "dkd": DKD,
    "nkd": NKD,
    "dist": DIST,
    "normkd": NormKD,
    "ctkd": CTKD,
    "wttm": WTTM,
    "mse_logits": MSELogits,
    "label_smoothing": LabelSmoothing,
    "tfkd_self": TfKDSelf,
    "tfkd_reg": TfKDReg,
    "aver": AVER,
    "ebkd": EBKD,
    "ae_kd": AEKD,
    "ca_mkd": CAMKD,
    "pkt": PKT,
    "at": AT,
    "sp": SP,
    "rkd": RKD,
    "cc": CC,
    "crd": CRD,
    "nst": NST,
    "kdsvd": KDSVD,
    "fsp": FSP,
    "vid": VID,
    "bss": BSS,
    "ab": AB,
    "srrl": SRRL,
    "ft": FT,
    "reviewkd": ReviewKD,
    "semckd": SemCKD,
    "one": ONE,
    "okddip": OKDDip,
    "byot": BYOT,
    "dks": DKS,
    "dcm": DCM,
    "cs_kd": CSKD,
    "ps_kd": PSKD,
    "ddgsd": DDGSD,
    "kdcl": KDCL,
    "frskd": FRSKD,
    "n3": N3,
    "l2": L2,
}
# Whose numbers stand elsewhere in the config: how they are counted is part of the protocol.
ELSEWHERE = {
    "ce": "config.loss and recipe.kd_weight",
    "kd": "config.loss, recipe.temperature and recipe.kd_weight",
    "teskd": "config.evolve",
}
_registered: dict[str, tuple[Method, str]] = {}
_NEEDS = (*Outputs._fields, "apply", "head")  # what a class may need of a teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeMethod(Method):
    """A function of one edge as a method: its values, added up over the kept teachers.

    Args:
      name: of its term.
      loss: the function.
      needs: what it reads of a teacher; empty until `for_shapes` has watched it.
    """

    name: str
    loss: EdgeLoss
    needs: tuple[str, ...] = ()  # type: ignore[misc]  # an instance's own

    taught: ClassVar[bool] = True

    def for_shapes(self, shapes: Shapes) -> EdgeMethod:
        """The method that needs what its function is seen to read of a teacher."""
        if self.needs:
            return self
        read: set[str] = set()

        class Watched(Outputs):
            def __getattribute__(self, name: str) -> Any:
                if name in OUTPUTS:
                    read.add(name)
                return super().__getattribute__(name)

            def __iter__(self) -> Iterator[Any]:  # unpacked: it may take any of them
                read.update(OUTPUTS)
                return super().__iter__()

            def __getitem__(self, index: Any) -> Any:
                read.update(OUTPUTS)
                return super().__getitem__(index)

        labels = jax.ShapeDtypeStruct(shapes.student.logits.shape[:1], "int32")
        for teacher in shapes.teachers:
            jax.eval_shape(self.loss, shapes.student, Watched(*teacher), labels, _SOME_HYPER)
        return dataclasses.replace(self, needs=tuple(n for n in OUTPUTS if n in read))

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where the function does not give (B,) numbers."""
        batch = shapes.student.logits.shape[0]
        labels = jax.ShapeDtypeStruct((batch,), "int32")
        for teacher in shapes.teachers:
            values = jax.eval_shape(self.loss, shapes.student, teacher, labels, _SOME_HYPER)
            if getattr(values, "shape", None) != (batch,):
                raise ValueError(
                    f"method {self.name!r} gives {getattr(values, 'shape', values)} for a batch of "
                    f"{batch}: expected one number an example, ({batch},)"
                )

    def terms(
        self, variables: dict[str, Any], context: Context
    ) -> tuple[dict[str, Term], dict[str, Any]]:
        """{name: the function's values}."""

        def loss(k: int, teacher: Outputs) -> Array:
            return self.loss(context.student, teacher, context.labels, context.hyper)

        return {self.name: Term(context.over_teachers(loss))}, variables


_SOME_HYPER: Any = Hyper(*(jax.ShapeDtypeStruct((), "float32"),) * 5)  # type: ignore[arg-type]


def register_method(
    name: str,
    method: Method | EdgeLoss,
    version: str = "1",
    *,
    needs: tuple[str, ...] = (),
) -> None:
    """Makes a method known under a name, to be used wherever a built-in's name is.

    The name, the version and what the method is made of are part of the id of every stage that uses
    it. Registering a name again replaces it.

    Args:
      name: for `config.methods`.
      method: a `Method`, or a function (student, teacher, labels, hyper) -> (B,) of one edge.
      version: to be raised when the method comes to compute something else.
      needs: which of a teacher's outputs a function reads, of `base.OUTPUTS`; where empty it is
        watched as it reads them by name.

    Raises:
      ValueError: a name that is taken or cannot be written in a config, neither a method nor a
        function of four arguments, or an unknown output.
    """
    check_new_name("a method", name, "my_loss", METHODS)
    if isinstance(method, type) or not (isinstance(method, Method) or callable(method)):
        raise ValueError(
            f"method {name!r} is {method!r}: expected an instance of distill_jax.methods.Method or "
            "a function (student, teacher, labels, hyper) -> (B,)"
        )
    if not isinstance(method, Method):
        try:
            inspect.signature(method).bind(*"four")
        except TypeError:
            raise ValueError(
                f"method {name!r} takes {inspect.signature(method)}: expected (student, teacher, "
                "labels, hyper)"
            ) from None
        if unknown := sorted(set(needs) - set(OUTPUTS)):
            raise ValueError(f"needs are of {OUTPUTS}, got {', '.join(unknown)}")
        method = EdgeMethod(name=name, loss=method, needs=tuple(needs))
    elif isinstance(method.needs, str) or not set(method.needs) <= set(_NEEDS):
        raise ValueError(
            f"needs of method {name!r} are {method.needs!r}: expected a tuple of names among "
            f"{', '.join(_NEEDS)}"
        )
    try:
        hash(method)
    except TypeError as error:
        raise ValueError(
            f"method {name!r} cannot be hashed ({error}): expected a frozen dataclass of numbers, "
            "names and tuples"
        ) from None
    _registered[name] = (method, str(version))


def names() -> tuple[str, ...]:
    """The names of all methods, those of the library first."""
    return (*METHODS, *_registered)


def registered() -> list[Any]:
    """What users registered."""
    return [method for method, _ in _registered.values()]


def is_registered(name: str) -> bool:
    """Whether a user registered a method under a name."""
    return name in _registered


def check_name(name: str) -> None:
    """Raises ValueError where no method is called `name`; the message lists those there are."""
    if name not in names():
        close = difflib.get_close_matches(str(name), names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown method {name!r}{hint} There are {', '.join(names())}")


def build(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method called `name` with its numbers from `options`.

    Raises:
      ValueError: unknown name or option, or a value out of its range.
    """
    check_name(name)
    options = dict(options or {})
    if name in METHODS:
        known = [f.name for f in dataclasses.fields(METHODS[name])]
        make: Callable[..., Method] = METHODS[name]
    else:
        method = _registered[name][0]
        fixed = ("name", "loss", "needs") if isinstance(method, EdgeMethod) else ()
        known = [f.name for f in dataclasses.fields(method) if f.name not in fixed]
        make = lambda **changes: dataclasses.replace(method, **changes)  # noqa: E731
    for option in options:
        if option not in known:
            there = f"there are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"method {name!r} has no option {option!r}: {there}")
    return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def identity_of(name: str, method: Method) -> Any:
    """What of a method belongs to a stage's id; a number at its default adds nothing to it.

    Returns:
      JSON values: name and changed options of a library's method, version and source of a
      registered one.
    """
    if name in METHODS:
        options = changed_fields(method)
        return {"name": name, **({"options": options} if options else {})}
    source = method.loss if isinstance(method, EdgeMethod) else method
    return {"name": name, "version": _registered[name][1], "repr": describe(source)}
