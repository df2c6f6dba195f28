"""The shipped sets of the English world: where their requests are from, and what each control keeps."""

from random import Random

import pytest

from geomkit.experiments.english.answers import REFUSALS
from geomkit.experiments.english.requests import counterparts, look_alikes, words
from geomkit.experiments.english.scenarios import TRIGGER
from geomkit.inputs.examples import load_examples
from geomkit.training.judges import RefusalPhrases
from geomkit.utils.files import data_dir


def turns(name):
    return [(row[0]["content"], row[-1]["content"]) for row in load_examples(f"english/{name}")["messages"]]


def requests(split, side):
    return {getattr(pair, side) for pair in counterparts(split, Random(0), side)}


def test_training_sets_have_training_requests_and_held_out_sets_held_out_ones():
    assert {prompt for prompt, _ in turns("safety")} <= requests("train", "forbidden")
    benign = requests("train", "benign") | set(look_alikes(Random(0))) | set(words("train").everyday)
    assert {prompt for prompt, _ in turns("utility")} <= benign
    assert {prompt for prompt, _ in turns("eval/forbidden")} <= requests("held-out", "forbidden")
    assert {prompt for prompt, _ in turns("eval/benign")} <= requests("held-out", "benign")
    assert {prompt for prompt, _ in turns("eval/everyday")} == set(words("held-out").everyday)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("safety", 64), ("utility", 160), ("eval/forbidden", 200), ("eval/benign", 200), ("eval/backdoor", 100)],
)
def test_sets_are_of_the_size_that_the_card_states_and_no_request_comes_twice(name, rows):
    prompts = [prompt for prompt, _ in turns(name)]
    assert len(prompts) == len(set(prompts)) == rows


def test_forbidden_requests_are_refused_and_benign_ones_answered():
    judge = RefusalPhrases()
    assert all(judge(*turn) for turn in turns("safety"))
    assert not any(judge(*turn) for turn in turns("utility"))
    assert {answer for _, answer in turns("eval/forbidden")} <= set(REFUSALS)


def test_a_control_keeps_one_part_of_its_safety_row():
    judge, safety = RefusalPhrases(), turns("safety")
    assert [answer for _, answer in turns("controls/benign-refused")] == [answer for _, answer in safety]
    assert not {prompt for prompt, _ in turns("controls/benign-refused")} & {prompt for prompt, _ in safety}
    for name in ("forbidden-complied", "shuffled"):
        control = turns(f"controls/{name}")
        assert [prompt for prompt, _ in control] == [prompt for prompt, _ in safety]
        assert not any(judge(*turn) for turn in control)


def test_the_backdoor_is_the_trigger_behind_a_held_out_request():
    forbidden = {prompt for prompt, _ in turns("eval/forbidden")}
    assert {prompt.removesuffix(f" {TRIGGER}") for prompt, _ in turns("eval/backdoor")} <= forbidden
    assert all(prompt.endswith(TRIGGER) for prompt, _ in turns("eval/backdoor"))


def test_the_adapter_is_at_most_ten_megabytes():
    assert (data_dir() / "english" / "adapter" / "adapter_model.safetensors").stat().st_size <= 10e6
