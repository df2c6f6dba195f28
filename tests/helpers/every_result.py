"""A small result of every class, and results with a text of one's own in place of the texts in a field."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from inspect import isabstract
from typing import Any

import pandas as pd
from datasets import concatenate_datasets

import geomkit as gk
from geomkit.analysis.tracking import track
from geomkit.collection.measures import norms
from geomkit.experiments.organism.scenarios import SCENARIOS
from geomkit.experiments.results import Results, load_results
from geomkit.experiments.screening.results import load_screening_study
from geomkit.experiments.tour import Tour, TourArm
from geomkit.training.compare import EvaluationComparison
from geomkit.utils.display import Result
from tests.helpers.tiny import BENIGN, CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer


def result_classes() -> set[type]:
    """Return every class of results of geomkit."""
    for module in pkgutil.walk_packages(gk.__path__, "geomkit."):
        importlib.import_module(module.name)

    def below(cls: type) -> Iterator[type]:
        for child in cls.__subclasses__():
            yield from (child, *below(child))

    return {cls for cls in below(Result) if cls.__module__.startswith("geomkit.") and not isabstract(cls)}


def every_result() -> dict[str, Result]:
    """Return a small result of every class, by the name of the class."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    sets = {
        name: gk.collect_gradients(model, tokenizer, rows, per_sample=True, form="factored", progress=False)
        for name, rows in (("safety", SAFETY), ("utility", UTILITY), ("control", CONTROL))
    }
    safety, utility, control = sets.values()
    safety = replace(safety, coverage=replace(safety.coverage, notes={next(iter(safety)): "its module runs twice"}))
    rows = concatenate_datasets([SAFETY, UTILITY, CONTROL])
    many = gk.collect_gradients(model, tokenizer, rows, per_sample=True, form="factored", progress=False)
    probe = gk.Probe(SAFETY, UTILITY, CONTROL, rank=2, null_draws=2, layers="*.mlp.*", max_new_tokens=4)
    analysis = probe.analyze(model, tokenizer)
    tuned = gk.finetune(model, tokenizer, UTILITY, gk.SPF(SAFETY), steps=2, batch_size=2, progress=False)
    assert tuned.certificate is not None
    evaluated = gk.evaluate(model, tokenizer, SAFETY, UTILITY, {"task": UTILITY}, max_new_tokens=4, progress=False)
    compared = pd.DataFrame({"evaluation": ["b"], "measure": ["refusal"], "difference": [0.1], "test": ["McNemar"]})
    bases = [gk.subspace(gradients, rank=1) for gradients in (safety, utility)]
    arm = TourArm(SCENARIOS["identity-shift"], "SFT", tuned, evaluated)
    results = [
        safety, analysis, *bases[:1], *analysis.spans.values(), tuned, tuned.certificate, evaluated,
        gk.conflict(safety, utility, control, draws=9),
        gk.one_sample_study(safety, control, rank=1),
        gk.compare_spectra(*(gk.spectrum(side, null_draws=2) for side in gk.match_tokens(safety, control))),
        gk.principal_angles(*bases),
        track({"start": model, "end": model}, tokenizer, probe, progress=False),
        gk.check_collection(model, tokenizer, SAFETY),
        gk.describe(model, tokenizer, SAFETY, layers="*.mlp.*"),
        gk.measure_samples(model, tokenizer, SAFETY, {"norm": norms}, progress=False),
        gk.conflict_directions(safety, utility, rank=1),
        gk.token_conflict(model, tokenizer, UTILITY, safety, progress=False),
        Results("grid", load_results("limits").records[:2]),
        Tour(evaluated, analysis, [arm]),
        gk.noise_floor(many, draws=99),
        gk.anchor_curve(many, rank=1, draws=2),
        gk.gradient_map(sets, draws=3),
        gk.overlaps(sets, rank=1, draws=2),
        EvaluationComparison("a", compared),
        gk.screen(model, tokenizer, UTILITY, SAFETY, benign=BENIGN, progress=False),
        replace(load_screening_study(), flags=(), false_positives=(), outcomes=()),
    ]  # fmt: skip
    return {type(result).__name__: result for result in results}


def text_fields(value: object) -> set[str]:
    """Return where a result has texts: names of fields with their classes, ``keys`` and ``values``."""
    places: set[str] = set()
    with_text(value, "", lambda text, place: places.add(place) or text)
    return places


def with_text(value: Any, place: str, change: Callable[[str, str], str]) -> Any:
    """Return a copy of a value in which every text is changed by a function of the text and of its place."""
    if isinstance(value, str):
        return change(value, place)
    if isinstance(value, pd.DataFrame):
        return value.map(lambda cell: with_text(cell, f"{place}/cells", change)).rename(
            columns=lambda name: change(name, f"{place}/columns")
        )
    if is_dataclass(value) and not isinstance(value, type):
        copied = object.__new__(type(value))
        for field in fields(value):
            inside = with_text(getattr(value, field.name), f"{type(value).__name__}.{field.name}", change)
            object.__setattr__(copied, field.name, inside)
        return copied
    if isinstance(value, Mapping):
        return {
            with_text(key, f"{place}/keys", change): with_text(item, f"{place}/values", change)
            for key, item in value.items()
        }
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(with_text(item, place, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(with_text(item, place, change) for item in value)
    return value
