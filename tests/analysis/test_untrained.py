"""The whole chain on models that have learnt nothing: it must find nothing that is about safety."""

from collections.abc import Iterator

import pytest
from scipy.stats import binom
from transformers import LlamaConfig, LlamaForCausalLM

import geomkit as gk
from geomkit.analysis.analysis import Analysis
from geomkit.inputs import models

_MODELS = 10
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def untrained(organism) -> list[Analysis]:
    """Analyses of random Llamas that read the organism's language, each with examples of its own."""
    model, tokenizer = organism
    safety, control = gk.load_examples("safety"), gk.load_examples("controls/benign-refused")
    utility = gk.load_examples("scenarios/new-skill")
    small = LlamaForCausalLM(LlamaConfig(**(model.config.to_dict() | _SMALL)))
    return [
        gk.Probe(safety, utility, control, examples=24, null_draws=2, seed=seed).analyze(
            models.untrained(small, seed=seed), tokenizer
        )
        for seed in range(_MODELS)
    ]


def differences(found: Analysis) -> Iterator[tuple[str, tuple[float, float]]]:
    """Everything that is said of safety beside its control."""
    contrast = found.rank_contrast("control")
    yield "effective rank", contrast.mean("effective_rank")[1]
    yield "CER(10)", contrast.mean("cer10")[1]
    yield "conflict", found.conflict.contrast.interval
    yield "conflict, equal weights", found.conflict.equal_weights.contrast.interval
    yield "one sample", found.one_sample.contrast_interval
    yield "one sample, cosine", found.one_sample.groups["control"].cosine.contrast_interval
    yield "span", found.span_contrast("control").mean("effective_rank")[1]


def test_a_random_model_shows_nothing_that_is_about_safety(untrained) -> None:
    """Of all differences to the control, no more exclude zero than 5 % would in all but one of 1000 experiments."""
    found = [(name, low <= 0 <= high) for each in untrained for name, (low, high) in differences(each)]
    missed = [name for name, covered in found if not covered]
    assert len(missed) <= binom.ppf(0.999, len(found), 0.05), missed


def test_the_null_alone_would_have_been_beaten(untrained) -> None:
    """Refusals repeat their words: without a control, every random model's safety gradients would look low-rank."""
    for found in untrained:
        high = found.safety.interval("effective_rank")[1]
        assert high < found.safety.null_mean("effective_rank")


def test_conflict_alone_would_have_been_found(untrained) -> None:
    """The cosine belongs to the random weights: most intervals exclude zero, on either side, as the control's does."""
    found = [each.conflict for each in untrained]
    signs = {low > 0 for low, high in (each.interval for each in found) if low > 0 or high < 0}
    assert signs == {True, False}
    assert sum(low > 0 or high < 0 for low, high in (each.interval for each in found)) > _MODELS / 2
    assert all(each.corrected * each.contrast.control > 0 for each in found)
