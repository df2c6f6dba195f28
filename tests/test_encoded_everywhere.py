"""Encoded examples are taken wherever examples are taken, and give what the examples give."""

import pytest

import geomkit as gk
from geomkit.analysis.tracking import track
from geomkit.collection.measures import norms
from geomkit.errors import DataError
from geomkit.inputs.control_sets import random_tokens, shuffled_pairs
from geomkit.training.losses import mean_loss
from geomkit.training.responses import own_responses
from tests.helpers.tiny import BENIGN, CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUIET = {"progress": False}
QUICK = {"steps": 1, "batch_size": 2, "progress": False}


def refuses_all(prompt, response):
    return True


def finetuned(train, spf=None):
    return gk.finetune(tiny_llama(), TOKENIZER, train, spf, **QUICK).history["loss"].tolist()


def measured(examples):
    samples = gk.measure_samples(tiny_llama(), TOKENIZER, examples, {"norm": norms}, **QUIET)
    return samples.values["norm"]["lm_head.weight"].tolist()


def probed(examples):
    probe = gk.Probe(examples, SAFETY, CONTROL, examples=3, null_draws=1)
    return track({"model": tiny_llama()}, TOKENIZER, probe, **QUIET).to_frame()["value"].fillna(0).tolist()


TAKERS = {
    "collect_gradients": lambda rows: gk.collect_gradients(tiny_llama(), TOKENIZER, rows, **QUIET).norm,
    "check_collection": lambda rows: gk.check_collection(tiny_llama(), TOKENIZER, rows, **QUIET).ok,
    "describe": lambda rows: str(gk.describe(tiny_llama(), TOKENIZER, rows)),
    "sample_grams": lambda rows: gk.sample_grams(tiny_llama(), TOKENIZER, rows, **QUIET)["lm_head.weight"].tolist(),
    "measure_samples": measured,
    "Probe and track": probed,
    "token_conflict": lambda rows: str(
        gk.token_conflict(
            tiny_llama(), TOKENIZER, rows, gk.collect_gradients(tiny_llama(), TOKENIZER, SAFETY, **QUIET), **QUIET
        )
    ),
    "screen": lambda rows: (
        gk.screen(tiny_llama(), TOKENIZER, rows, SAFETY, benign=BENIGN, **QUIET).to_frame()["score"].tolist()
    ),
    "safety of a screen": lambda rows: gk.screen(
        tiny_llama(), TOKENIZER, SAFETY, rows, benign=BENIGN, **QUIET
    ).rows.raw.tolist(),
    "finetune": finetuned,
    "anchors": lambda rows: finetuned(UTILITY, gk.SPF(anchors=rows)),
    "fence": lambda rows: finetuned(UTILITY, gk.SPF(anchors=SAFETY, benign=rows)),
    "evaluate": lambda rows: gk.evaluate(
        tiny_llama(), TOKENIZER, rows, rows, {"skill": rows}, max_new_tokens=2, **QUIET
    ).responses.to_dict(),
    "own_responses": lambda rows: own_responses(tiny_llama(), TOKENIZER, rows, max_new_tokens=2, **QUIET)["messages"],
    "own_refusals": lambda rows: gk.own_refusals(
        tiny_llama(), TOKENIZER, rows, judge=refuses_all, max_new_tokens=2, **QUIET
    )["messages"],
    "prompts": lambda rows: gk.with_responses(rows, SAFETY)["messages"],
    "responses": lambda rows: gk.with_responses(UTILITY, rows)["messages"],
    "shuffled_pairs": lambda rows: shuffled_pairs(rows)["messages"],
    "random_tokens": lambda rows: random_tokens(rows, TOKENIZER)["messages"],
    "mean_loss": lambda rows: mean_loss(tiny_llama(), TOKENIZER, rows),
    "encode": lambda rows: list(gk.encode(TOKENIZER, rows)),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_encoded_examples_give_what_the_examples_give(taker):
    take = TAKERS[taker]
    assert take(gk.encode(TOKENIZER, UTILITY)) == take(UTILITY)


def test_examples_in_the_place_of_spf_are_refused():
    with pytest.raises(DataError, match=r"expected geomkit.SPF\(anchors=…\) or nothing as spf, found an Enc"):
        finetuned(UTILITY, gk.encode(TOKENIZER, SAFETY))


def test_settings_of_the_encoding_are_not_arguments_of_a_fine_tune():
    with pytest.raises(DataError, match=r"give geomkit.encode\(tokenizer, train, max_length=40\) as the examples"):
        gk.finetune(tiny_llama(), TOKENIZER, UTILITY, max_length=40, **QUICK)
    with pytest.raises(TypeError, match=r"analyze\(\) expects examples, .* found max_length=; geomkit.encode has"):
        gk.analyze(tiny_llama(), TOKENIZER, SAFETY, UTILITY, max_length=40)
