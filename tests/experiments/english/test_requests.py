"""The requests of the English world: the two splits, and the balance of forbidden and benign requests."""

import re
from itertools import islice
from random import Random

import pytest

from geomkit.experiments.english.requests import counterparts, words

SPLITS = ("train", "held-out")


def patterns(split):
    return {pair.pattern for pair in words(split).pairs if pair.pattern not in {"{}", "What is {}?"}}


def slots(split):
    return {word for pair in words(split).pairs for word in (*pair.harmful, *pair.harmless)}


def test_there_are_at_least_eight_kinds_of_harm():
    assert len({pair.kind for pair in words("train").pairs}) >= 8
    assert len({pair.kind for pair in words("held-out").pairs}) >= 8


def test_the_splits_share_no_pattern_and_no_word_of_a_slot():
    assert not patterns("train") & patterns("held-out")
    assert not slots("train") & slots("held-out")
    assert not set(words("train").everyday) & set(words("held-out").everyday)


def test_the_splits_share_no_phrasing_but_that_of_a_question_which_stands_alone():
    train, held_out = (words(split).phrasings for split in SPLITS)
    shared = {form: set(train[form]) & set(held_out[form]) for form in train}
    assert shared == {"act": set(), "product": set(), "whole": {"{}"}}


@pytest.mark.parametrize("split", SPLITS)
def test_no_word_is_written_twice(split):
    for pair in words(split).pairs:
        assert len(set(pair.harmful)) == len(pair.harmful)
        assert len(set(pair.harmless)) == len(pair.harmless)
        assert not set(pair.harmful) & set(pair.harmless)
    for texts in words(split).phrasings.values():
        assert len(set(texts)) == len(texts)


def test_no_training_request_has_a_held_out_verb():
    verbs = {pair.pattern.split()[0] for pair in words("held-out").pairs if pair.form == "act"} - {"{}"}
    assert len(verbs) >= 12
    pairs = [*words("train").pairs, *words("train").look_alikes]
    trained = " ".join(f"{pair.pattern.format(word)}." for pair in pairs for word in (*pair.harmful, *pair.harmless))
    as_verb = [verb for verb in verbs if re.search(rf"(^|\. |\bto |\bI ){verb}\b", trained)]
    assert not as_verb


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("by", ["forbidden", "benign"])
def test_requests_of_the_chosen_side_are_distinct_and_counterparts_differ_in_the_slot_only(split, by):
    rows = list(counterparts(split, Random(0), by))
    requests = [getattr(row, by) for row in rows]
    assert len(set(requests)) == len(requests)
    assert not {row.forbidden for row in rows} & {row.benign for row in rows}
    whole = {word for pair in words(split).pairs if pair.pattern == "{}" for word in pair.harmful}
    for pair in words(split).pairs:
        before, _, after = pair.pattern.partition("{}")
        for row in rows:
            if (
                row.act not in whole
                and row.kind == pair.kind
                and row.act.startswith(before)
                and row.act.endswith(after)
                and before
            ):
                assert before.lower() in row.benign.lower()
                break


def test_the_first_round_has_every_word_once():
    count = sum(len(pair.harmful) for pair in words("train").pairs)
    first = [row.act for row in islice(counterparts("train", Random(3), "forbidden"), count)]
    assert len(set(first)) == count


def test_a_seed_gives_the_same_requests_again():
    first, again, other = (list(islice(counterparts("train", Random(seed), "benign"), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
