"""What a step of a compiled train loop consists of, read from its HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# What launches nothing by itself.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
FREE |= {"opt-barrier", "partition-id", "replica-id"}
COLLECTIVES = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute)(-start)?$")
CAPTURED = 5  # kernels in a row, from which on XLA makes one command buffer of them
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


class Instruction(NamedTuple):
    """One line of HLO.

    Args:
      name: its own.
      shape: of its output, as text.
      op: the opcode.
      line: all of it.
    """

    name: str
    shape: str
    op: str
    line: str

    @property
    def is_convolution(self) -> bool:
        """Whether it is one, or a library's."""
        return self.op == "convolution" or "__cudnn$conv" in self.line

    @property
    def cycles(self) -> int:
        """What libtpu estimates; 0 where it does not, or where that is out of all bounds."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found[1]) if found and int(found[1]) < 1e12 else 0

    @property
    def size(self) -> int:
        """Bytes of its output."""
        found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", self.shape)
        return sum(
            BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in found
        )


@dataclasses.dataclass
class Counted:
    """A step, or a part of it.

    Args:
      kernels: that the device is given.
      submitted: by the host: kernels that XLA captures together are given at once.
      convolutions: among the kernels, those of fusions too.
      collectives: among the kernels.
      written: bytes, by all kernels.
      cycles: of a TPU, as its compiler estimates; what it has no estimate of counts nothing.
      names: of the kernels.
    """

    kernels: int = 0
    submitted: int = 0
    convolutions: int = 0
    collectives: int = 0
    written: int = 0
    cycles: int = 0
    names: list[str] = dataclasses.field(default_factory=list)
    _row: int = 0  # captured kernels in a row, not yet submitted

    def add(self, other: Counted, times: int = 1) -> None:
        """Another part, so many times."""
        self.end_row()
        for field in SUMS:
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        self.names += times * other.names

    def end_row(self) -> None:
        """Whatever comes next is not captured with what was before."""
        self.submitted += 1 if self._row >= CAPTURED else self._row
        self._row = 0


SUMS = ("kernels", "submitted", "convolutions", "collectives", "written", "cycles")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(")
START = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")


class Program:
    """The computations of a compiled module.

    Args:
      text: its HLO, scheduled.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        name = ""
        for line in text.splitlines():
            if started := START.match(line):
                name = started[2]
                self.computations[name] = []
                self.entry = name if started[1] else self.entry
            elif name and (found := LINE.match(line)):
                self.computations[name].append(Instruction(found[1], found[2], found[3], line))

    @property
    def step(self) -> Counted:
        """A turn of the train loop: the largest whose number of turns is not known."""
        loops = [x for x in self._reached(self.entry) if x.op == "while" and not _turns(x)]
        if not loops:
            raise ValueError("the program has no loop over steps")
        counted = [self._loop(x) for x in loops]
        return max(counted, key=lambda one: one.kernels)

    @property
    def dispatch_cycles(self) -> int:
        """What a dispatch costs beside its steps."""
        return self.count(self.entry).cycles - self.step.cycles

    def _loop(self, loop: Instruction) -> Counted:
        counted = self.count(_called(loop, "body"))
        counted.add(self.count(_called(loop, "condition")))
        return counted

    def _reached(self, name: str) -> Iterator[Instruction]:
        for one in self.computations[name]:
            yield one
            if one.op == "call":
                yield from self._reached(_called(one, "to_apply"))

    def count(self, name: str) -> Counted:
        """What a computation consists of."""
        counted = Counted()
        for one in self.computations[name]:
            self._count_one(one, counted)
        counted.end_row()
        return counted

    def _count_one(self, one: Instruction, counted: Counted) -> None:
        if one.op in FREE or one.op.endswith("-done"):
            return
        if one.op == "while":
            counted.add(self._loop(one), _turns(one) or 1)
        elif one.op == "call":
            counted.add(self.count(_called(one, "to_apply")))
        elif one.op == "conditional":
            branches = [self.count(name) for name in _branches(one)]
            counted.add(max(branches, key=lambda branch: branch.kernels))
        else:
            counted.kernels += 1
            counted.written += one.size
            counted.cycles += one.cycles
            counted.names.append(one.name)
            inside = self.computations[_called(one, "calls")] if one.op == "fusion" else [one]
            counted.convolutions += sum(x.is_convolution for x in inside)
            if COLLECTIVES.match(one.op):
                counted.collectives += 1
            if one.is_convolution and one.op == "custom-call":
                counted.end_row()
                counted.submitted += 1
            else:
                counted._row += 1


def _called(one: Instruction, role: str) -> str:
    found = re.search(rf"\b{role}=%?([\w.\-]+)", one.line)
    assert found, one.line
    return found[1]


def _branches(one: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.line)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [_called(one, role) for role in ("true_computation", "false_computation")]


def _turns(loop: Instruction) -> int:
    """Of a loop; 0 where the program is told only when it runs."""
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line)
    return int(found[1]) if found else 0
