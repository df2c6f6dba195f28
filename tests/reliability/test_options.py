"""Every numeric option of the command line, of grids and of functions: in its range, or one line that says so."""

import inspect
import math
from contextlib import suppress
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import geomkit as gk
from geomkit.cli.main import app, main, organism_app
from geomkit.collection.measures import norms, sketch
from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.grid import load_grid, method_options
from geomkit.experiments.methods import METHODS
from geomkit.gradients.factored import FactoredGradient
from geomkit.inputs.models import untrained, with_lora
from geomkit.training.responses import generate, own_responses
from geomkit.utils.options import OPTIONS, Range, check_option, check_options
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer

STRANGE = [math.nan, math.inf, -math.inf, 0, -1, 2**70, 10**30, 10**5000, 0.5, True, "many", [1], None]
"""Values of which each option takes a few at most."""


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_takes_what_the_defaults_are():
    signatures = [gk.finetune, gk.evaluate, gk.collect_gradients, gk.conflict, gk.spectrum, gk.noise_floor, gk.overlaps]
    for function in (*signatures, *METHODS.values()):
        for name, parameter in inspect.signature(function).parameters.items():
            number = isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)
            if number and name not in {"confidence", "memory", "groups"}:
                assert OPTIONS[name].holds(parameter.default), name
    for field in fields(gk.SPF):
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert OPTIONS[field.name].holds(field.default), field.name


def test_every_number_that_an_arm_takes_is_in_the_table():
    functions = [*METHODS.values()]
    numbers = {
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation in (int, float)
    }
    taken = set().union(*map(method_options, METHODS))
    assert numbers & taken <= set(OPTIONS)


@given(st.sampled_from(sorted(OPTIONS)), st.integers() | st.floats() | st.sampled_from(STRANGE))
def test_a_value_is_in_the_range_or_refused_in_one_line(name, value):
    allowed = OPTIONS[name]
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    whole = isinstance(value, int)
    inside = number and (whole or not allowed.whole) and allowed.low <= value <= allowed.high
    inside = inside and not (allowed.open and value == allowed.low)
    if inside:
        check_option(name, value)
        check_options({name: value})
        return
    with pytest.raises(DataError, match=f"^expected {name} to be a ") as refused:
        check_option(name, value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_an_option_left_out_is_not_checked():
    check_options({"seed": None, "unknown": -1})


def test_a_range_says_itself():
    assert str(Range(1, 10**6)) == "a whole number from 1 to 1,000,000"
    assert str(Range(0, 1e300, whole=False, open=True)) == "a finite number above 0"


# ------------------------------------------------------------------------------------------------ command line


def commands():
    """Yield every command with its numeric options: the name in Python, the flag, and the type."""
    for words, group in (((), app), (("organism",), organism_app)):
        for command in group.registered_commands:
            numbers = []
            for name, annotated in get_type_hints(command.callback, include_extras=True).items():
                kind = next((part for part in (int, float) if part in {annotated, *flat(annotated)}), None)
                if kind is not None:
                    numbers.append((name, f"--{name.replace('_', '-')}", kind))
            yield [*words, command.name or command.callback.__name__], numbers


def flat(annotated):
    """Return the types in an annotation, without its notes."""
    kind = get_args(annotated)[0] if hasattr(annotated, "__metadata__") else annotated
    return {kind, *get_args(kind)}


def test_every_numeric_option_of_the_command_line_is_in_the_table():
    options = {name for _, numbers in commands() for name, *_ in numbers}
    assert options <= set(OPTIONS)
    assert len(options) > 10


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", str(2**70), "1e400", "9" * 5000, "0.5x", "", "0"])
def test_a_number_out_of_range_is_refused_before_anything_is_loaded(monkeypatch, capfd, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    tried = 0
    for words, numbers in commands():
        for name, flag, kind in numbers:
            with suppress(ValueError):
                if OPTIONS[name].holds(kind(value)):
                    continue
            monkeypatch.setattr("sys.argv", ["geomkit", *words, flag, value])
            capfd.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
            out, err = capfd.readouterr()
            assert (ended.value.code, out) == (2, ""), (words, flag)
            assert "Traceback" not in err
            assert flag in err
            tried += 1
    assert tried > 5
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ functions


def gradient_sets():
    def collect(rows):
        return gk.collect_gradients(
            tiny_llama(), tiny_tokenizer(), rows, per_sample=True, form="factored", layers="*.mlp.*", progress=False
        )

    return collect(SAFETY), collect(UTILITY), collect(CONTROL)


@pytest.fixture(scope="module")
def calls():
    """Functions of one numeric option, by the option and the function."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    safety, utility, control = gradient_sets()
    pair = (model, tokenizer)

    def tune(**options):
        steps = {} if "epochs" in options else {"steps": 1}  # which decide where they are given
        return gk.finetune(*pair, UTILITY, **{"progress": False} | steps | options)

    def guarded(**options):
        return gk.finetune(*pair, UTILITY, gk.SPF(SAFETY, **options), steps=1, progress=False)

    def ask(**options):
        return gk.evaluate(*pair, SAFETY, **{"max_new_tokens": 1, "progress": False} | options)

    def probe(**options):
        return gk.Probe(SAFETY, UTILITY, CONTROL, **options)

    functions = {
        "encode": (lambda **o: gk.encode(tokenizer, SAFETY, **o), ["max_length"]),
        "collect": (lambda **o: gk.collect_gradients(*pair, SAFETY, progress=False, **o), ["tokens_per_batch"]),
        "measure": (
            lambda **o: gk.measure_samples(*pair, SAFETY, {"n": norms}, progress=False, **o), ["tokens_per_batch"]
        ),
        "finetune": (tune, [
            "steps", "epochs", "batch_size", "learning_rate", "seed", "weight_decay", "max_grad_norm",
            "gradient_accumulation_steps",
        ]),
        "SPF": (guarded, [
            "rank", "anchors_per_step", "benign_per_step", "benign_margin", "drift_margin", "correction_limit",
            "refresh_every", "refresh_energy", "mix", "largest_mix", "seed",
        ]),
        "evaluate": (ask, ["batch_size", "max_new_tokens"]),
        "generate": (
            lambda **o: generate(*pair, [SAFETY["messages"][0][:1]], progress=False, **{"max_new_tokens": 1} | o),
            ["batch_size", "max_new_tokens"],
        ),
        "own_responses": (lambda **o: own_responses(*pair, SAFETY, progress=False, **o), ["max_new_tokens"]),
        "Probe": (probe, ["examples", "rank", "null_draws", "tokens_per_batch", "seed", "max_new_tokens"]),
        "spectrum": (lambda **o: gk.spectrum(safety, **{"null_draws": 1} | o), ["null_draws", "seed"]),
        "conflict": (lambda **o: gk.conflict(safety, utility, **{"draws": 9} | o), ["draws", "seed"]),
        "directions": (lambda **o: gk.conflict_directions(safety, utility, **o), ["rank"]),
        "subspace": (lambda **o: gk.subspace(safety, **{"rank": 1} | o), ["rank", "seed"]),
        "span": (lambda **o: gk.span(safety, **o), ["seed"]),
        "overlaps": (lambda **o: gk.overlaps({"a": safety, "b": control}, **{"rank": 1, "draws": 1} | o),
                     ["rank", "draws", "seed"]),
        "map": (lambda **o: gk.gradient_map({"a": safety, "b": control}, **{"draws": 1} | o), ["draws", "seed"]),
        "study": (lambda **o: gk.one_sample_study(safety, control, **o), ["rank"]),
        "match": (lambda **o: gk.match_tokens(safety, control, **o), ["seed"]),
        "sketch": (lambda **o: sketch(2, **o)("w", [FactoredGradient(torch.ones(1, 3), torch.ones(1, 3))]), ["seed"]),
        "untrained": (lambda **o: untrained(model, **o), ["seed"]),
        "with_lora": (lambda **o: with_lora(tiny_llama(), **{"rank": 1} | o), ["rank", "seed"]),
    }  # fmt: skip
    return [(name, option, call) for name, (call, options) in functions.items() for option in options]


@pytest.mark.filterwarnings("ignore:expected rank:UserWarning")
def test_every_function_takes_a_number_of_the_range_or_refuses_in_one_line(calls):
    tried = 0
    for name, option, call in calls:
        for value in (math.nan, math.inf, 0, -1, 2**70, "many"):
            if OPTIONS[option].holds(value) or (value == 0 and option in {"draws", "null_draws"}):
                continue
            try:
                call(**{option: value})
            except GeomkitError as error:
                refusal = str(error)
            else:
                refusal = ""
            assert refusal, (name, option, value)
            assert "\n" not in refusal, (name, option, value)
            tried += 1
    assert tried > 150


# ------------------------------------------------------------------------------------------------ grids


GRID = '[arms]\nrank1 = { rule = "rank1" }\n[[block]]\nscenarios = ["harmful-10"]\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GRID.replace('"rank1" }', '"rank1", anchors = 1000000000 }'), "anchors to be a whole number from 1 to 10,000"),
        (GRID.replace('"rank1" }', '"rank1", anchors = 0 }'), "expected anchors to be"),
        (GRID.replace('"rank1" }', '"rank1", anchors = "many" }'), "found 'many'"),
        (GRID.replace('"rank1" }', '"rank1", fence = -1 }'), "expected fence to be"),
        (GRID.replace('"rank1" }', '"rank1", drift_margin = nan }'), "expected drift_margin to be"),
        (GRID.replace('{ rule = "rank1" }', '{ method = "constrained-sft", betas = [inf] }'), "expected betas to be"),
        (GRID.replace("rank1 =", "a" * 300 + " ="), "expected names of arms up to 100 characters"),
        (GRID + "lengths = [inf]", "each of lengths"),
        (GRID + "lengths = [nan]", "each of lengths"),
        (GRID + "lengths = [1e30]", "each of lengths"),
        (GRID + "rates = [nan]", "each of rates"),
        (GRID + "rates = [0]", "each of rates"),
        (GRID + f"seeds = [{2**63}]", "each of seeds"),
        (GRID + "seeds = [true]", "each of seeds"),
        (GRID + "organisms = [-1]", "each of organisms"),
        (GRID + f"prompts = {10**18}", "prompts to be"),
        (GRID + f"along = {10**9}", "along to be"),
        (GRID + f"seeds = {list(range(400))}\norganisms = {list(range(400))}", "at most 100,000 cells in a block"),
        (f"x = {'9' * 5000}", "expected TOML"),
        ("x = " + "[" * 5000, "expected TOML"),
        ("name = 3\n" + GRID, "expected name = a string"),
        ("\x00", "expected TOML"),
    ],
)
def test_a_grid_with_a_number_out_of_range_is_one_line(tmp_path, text, found):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(GeomkitError, match=found) as refused:
        load_grid(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
