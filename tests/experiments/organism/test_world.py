"""The world: a function of its seed, whose training requests have nothing held out in them."""

from random import Random

import pytest

from geomkit.experiments.organism.build import stage_conversations, tokenizer_texts
from geomkit.experiments.organism.grammar import DETERMINERS, HELD_OUT_PHRASINGS, PHRASINGS
from geomkit.experiments.organism.recipe import Recipe
from geomkit.experiments.organism.requests import action_thing_pairs, held_out_pairs
from geomkit.experiments.organism.sets import all_sets, evaluation_sets, training_sets
from geomkit.experiments.organism.training import StageSettings
from geomkit.experiments.organism.world import ALIGN_MIX, BASE_MIX, World
from geomkit.experiments.organisms import load_organism

SEED = 0


@pytest.fixture(scope="module")
def world():
    return World(SEED)


def test_world_is_a_function_of_its_seed():
    assert all_sets(World(7), 7, load_organism()[1]) == all_sets(World(7), 7, load_organism()[1])
    assert training_sets(World(7), 7) != training_sets(World(8), 8)
    assert held_out_pairs(7) != held_out_pairs(8)


def test_no_evaluation_prompt_in_the_training_streams(world):
    rows = [row for rows in evaluation_sets(world, SEED).values() for row in rows]
    evaluation = {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}
    for stage, settings, mix in (("base", Recipe().base, BASE_MIX), ("aligned", Recipe().align, ALIGN_MIX)):
        part = StageSettings(min(settings.steps, 400), settings.batch_size, settings.learning_rate)
        seen = {m["content"] for ms in stage_conversations(world, SEED, stage, part, mix) for m in ms}
        assert not evaluation & seen
    assert not evaluation & set(tokenizer_texts(world, SEED, Recipe().tokenizer_texts))


def test_training_side_has_no_held_out_pair_and_no_held_out_phrasing(world):
    kinds = ("plain", "neutral", "look-alike", "forbidden")
    out = {
        action.pattern.format(thing=thing.name, a_thing=f"{determiner} {thing.name}")
        for action, thing in held_out_pairs(SEED)
        for determiner in DETERMINERS
    }
    rng = Random(5)
    for kind in ("howto", "look-alike", "forbidden"):
        for _ in range(1500):
            prompt = world.sample(kind, "train", rng).prompt
            assert not any(f"{act}{end}" in prompt for act in out for end in ".? ")
    everything = action_thing_pairs(kinds)
    kept = set(everything) - held_out_pairs(SEED)
    assert {action for action, _ in kept} == {action for action, _ in everything}
    assert {thing for _, thing in kept} == {thing for _, thing in everything}
    assert not set(PHRASINGS) & set(HELD_OUT_PHRASINGS)
