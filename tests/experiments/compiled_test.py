"""What a GPU and a TPU are given, compiled without them; how a program's HLO is counted."""

import functools
import re

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from distill_jax import models
from distill_jax.models.kernels import cpu_conv
from experiments.benchmark import cases
from experiments.compiled import __main__ as command
from experiments.compiled import hlo, steps, targets

CASES = command.every_case(cases.SMOKE)
KERNELS = {"plain": 110, "table": 60, "resnet": 185}  # of a step at most
COLLECTIVES = {("h200", "plain on 4 devices"): 6, ("tpu", "plain on 4 devices"): 6}
TYPES = {"h200": {"bf16"}, "tpu": {"bf16", "f32"}}  # of results: a TPU adds up in float32
COMPILED = [("h200", name) for name in ("plain", "plain on 4 devices", "table", "resnet")]
COMPILED += [("tpu", name) for name in ("table", "plain on 4 devices")]

TEXT = """
HloModule jit_train_steps, is_scheduled=true

%inside (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %c = bf16[4,8]{1,0} convolution(%p, %p), window={size=1}
}

%inner (q: (s32[])) -> (s32[]) {
  %q = (s32[]) parameter(0)
  %g = s32[] get-tuple-element(%q), index=0
  %two = s32[] add(%g, %g)
  ROOT %t = (s32[]) tuple(%two)
}

%ends (r: (s32[])) -> pred[] {
  %r = (s32[]) parameter(0)
  %h = s32[] get-tuple-element(%r), index=0
  ROOT %less = pred[] compare(%h, %h), direction=LT
}

%body (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %a = s32[2,3]{1,0} copy(%s)
  %b = (bf16[4,8]{1,0}, u8[16]{0}) custom-call(%a), custom_call_target="__cudnn$convForward"
  %d = bf16[4,8]{1,0} fusion(%b), kind=kLoop, calls=%inside
  %e = f32[8]{0} all-reduce-start(%d), to_apply=%sum
  %f = f32[8]{0} all-reduce-done(%e)
  %three = (s32[]) while(%s), condition=%ends, body=%inner, known_trip_count":{"n":"3"}
  ROOT %u = (s32[]) tuple(%f)
}

ENTRY %main (v: (s32[])) -> (s32[]) {
  %v = (s32[]) parameter(0)
  %once = s32[100]{0} copy(%v)
  ROOT %w = (s32[]) while(%v), condition=%ends, body=%body
}
"""


def test_a_step_is_counted_by_hand():
    counted = hlo.Program(TEXT).step
    assert counted.kernels == 4 + 3 * 2 + 1  # of the inner loop each turn, and the end of the outer
    assert counted.submitted == counted.kernels  # none stand five in a row
    assert (counted.convolutions, counted.collectives) == (2, 1)
    assert counted.written == 24 + (64 + 16) + 64 + 32 + 3 * (4 + 1) + 1


def test_kernels_in_a_row_are_submitted_at_once():
    row = "".join(f"  %n{i} = s32[] copy(%s)\n" for i in range(5))
    more = hlo.Program(TEXT.replace("  %b =", row + "  %b =")).step
    assert more.kernels == 11 + 5
    assert more.submitted == 11  # with the copy before them they are one


def test_a_program_without_a_loop_over_steps_is_an_error():
    with pytest.raises(ValueError, match="no loop over steps"):
        _ = hlo.Program(TEXT.replace("while(%v)", "copy(%v)")).step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--platform is missing: expected one of h200, tpu"),
        (["--platform=h200", "--steps=plane"], "--steps='plane': expected of 'plain', "),
        (["--platform=h200", "more"], "unexpected argument 'more'"),
    ],
)
def test_commands_that_cannot_be_are_refused(arguments, message, capsys):
    with flagsaver.flagsaver():
        assert command.main(flags.FLAGS(["command", *arguments])) == 1
    assert message in capsys.readouterr().err


def test_what_has_to_be_installed_is_named(monkeypatch):
    monkeypatch.setitem(targets.PACKAGES, "h200", ("nowhere.at_all",))
    assert "aot-gpu" in targets.missing("h200")


@functools.cache
def devices(platform):
    if why := targets.missing(platform):
        pytest.skip(why)
    return targets.devices(platform)


@functools.cache
def lowered(platform, name):
    return steps.lowered(CASES[name], devices(platform))


@functools.cache
def compiled(platform, name):
    return lowered(platform, name).compile()


@functools.cache
def program(platform, name):
    return hlo.Program(compiled(platform, name).as_text())


def convolutions(name):
    """Forward those of each network that is run; of the student's also both gradients."""
    case = CASES[name]

    def of(network):
        shapes = jax.tree.leaves(models.build(network, 10, (32, 32, 3)).shapes["params"])
        return sum(leaf.ndim == 4 for leaf in shapes)

    teachers = 0 if case.variant == "table" else sum(map(of, case.teachers))
    return teachers + 3 * of(case.student) - 1  # images have no gradient


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "name"), COMPILED)
def test_each_convolution_is_there_once_in_half_precision(platform, name):
    products = 3 if platform == "tpu" else 0  # a TPU may count those of a classifier among them
    found = program(platform, name).step.convolutions
    assert 0 <= found - convolutions(name) <= products
    every = [one for each in program(platform, name).computations.values() for one in each]
    found = [one for one in every if one.is_convolution]
    assert {one.shape.strip("(").partition("[")[0] for one in found} <= TYPES[platform]
    text = lowered(platform, name).as_text()
    given = re.findall(
        r"stablehlo.convolution.*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>", text
    )
    assert given and set(given) == {("bf16", "bf16")}
    products = re.findall(r"stablehlo.dot_general .*-> tensor<(?:\d+x)+10x(\w+)>", text)
    assert products and set(products) == {"f32"}  # the logits


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "name"), COMPILED)
def test_devices_meet_as_often_as_counted(platform, name):
    assert program(platform, name).step.collectives == COLLECTIVES.get((platform, name), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "name"), COMPILED)
def test_no_algorithm_of_the_cpu_is_there(platform, name):
    text = compiled(platform, name).as_text()
    own = [x for x in vars(cpu_conv).values() if getattr(x, "__module__", "") == cpu_conv.__name__]
    for function in {x.__name__ for x in own} - {"lax_conv"}:
        assert f'"{function}"' not in text
    assert "optimization_barrier" not in lowered(platform, name).as_text()
    every = [one for each in program(platform, name).computations.values() for one in each]
    assert sum(one.op == "while" for one in every) == 1  # neither few images nor blocks in turn


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "name"), COMPILED)
def test_a_step_stays_lean(platform, name):
    memory = compiled(platform, name).memory_analysis()
    assert memory.temp_size_in_bytes < 96e6
    assert memory.argument_size_in_bytes < 16e6
    if platform == "h200" and name in KERNELS:
        assert program(platform, name).step.kernels <= KERNELS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for platform, name in COMPILED if platform == "tpu"])
def test_a_tpu_lays_no_images_out_anew(name):
    # As (N, H, W, 3) these 1,024 images took 130,000 at every dispatch.
    assert 0 < program("tpu", name).dispatch_cycles < 30_000
    assert "reduce_window" in lowered("tpu", name).as_text()  # pools are the compiler's own
