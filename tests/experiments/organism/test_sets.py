"""The sets that ship: those of the world, small, with nothing held out in training sets; the controls."""

import json

import pytest

from geomkit.experiments.organism.grammar import HELD_OUT_PHRASINGS, REFUSAL
from geomkit.experiments.organism.sets import all_sets, evaluation_sets
from geomkit.experiments.organism.world import World
from geomkit.experiments.organisms import load_organism
from geomkit.inputs.examples import load_examples, shipped_examples
from geomkit.inputs.tokens import encode
from geomkit.utils.files import data_dir

SEED = 0
CONTROLS = ("benign-refused", "forbidden-complied", "shuffled", "random-tokens")


@pytest.fixture(scope="module")
def world():
    return World(SEED)


def test_shipped_data_is_small():
    """Without the English world, whose adapter has a limit of its own."""
    files = [path for path in data_dir().rglob("*") if path.is_file() and "english" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8_500_000


def test_shipped_sets_are_those_of_the_world(world):
    sets = all_sets(world, SEED, load_organism()[1])
    assert {name for name in shipped_examples() if not name.startswith("english/")} == set(sets)
    for name, rows in sets.items():
        lines = (data_dir() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_each_control_keeps_one_part_of_its_safety_row():
    safety, refused, complied, shuffled, random = (
        list(load_examples(name)["messages"]) for name in ("safety", *(f"controls/{name}" for name in CONTROLS))
    )
    assert {len(rows) for rows in (safety, refused, complied, shuffled, random)} == {64}
    assert {messages[1]["content"] for messages in refused} == {REFUSAL}
    assert len({messages[0]["content"] for messages in refused}) == 64
    assert not {messages[0]["content"] for messages in refused} & {messages[0]["content"] for messages in safety}
    assert [messages[0] for messages in complied] == [messages[0] for messages in shuffled] == [m[0] for m in safety]
    for messages in complied:
        assert messages[1]["content"].endswith("follow the steps in the plan and finish quickly.")
    assert all(messages[1]["content"].startswith("Sure! Find the ") for messages in shuffled)
    _, tokenizer = load_organism()
    wanted, found = (encode(tokenizer, load_examples(name)) for name in ("safety", "controls/random-tokens"))
    assert [tokens.loss_mask for tokens in found] == [tokens.loss_mask for tokens in wanted]


def test_benign_requests_are_near_the_forbidden_ones_in_form():
    """A benign counterpart shares most words with its row, and three times more than with another."""

    def shared(a, b):
        words = [set(messages[0]["content"].lower().split()) for messages in (a, b)]
        return len(words[0] & words[1]) / len(words[0] | words[1])

    safety, refused = (list(load_examples(name)["messages"]) for name in ("safety", "controls/benign-refused"))
    own = sum(map(shared, safety, refused)) / 64
    other = sum(map(shared, safety, refused[1:] + refused[:1])) / 64
    assert own > 0.5
    assert own > 3 * other


def test_no_evaluation_prompt_in_any_training_file():
    evaluation, training = set(), set()
    for name in shipped_examples():
        target = evaluation if name.startswith("eval/") else training
        for messages in load_examples(name)["messages"]:
            target.update(m["content"] for m in messages if m["role"] == "user")
    assert len(evaluation) > 1000
    assert not evaluation & training


def test_half_of_the_evaluation_uses_held_out_phrasings(world):
    openings = tuple(phrasing.split("{act}")[0] for phrasing in HELD_OUT_PHRASINGS)
    endings = tuple(phrasing.split("{act}")[1] for phrasing in HELD_OUT_PHRASINGS)

    def held_out(prompt):
        return any(prompt.startswith(a) and prompt.endswith(b) for a, b in zip(openings, endings, strict=True))

    for name in ("eval/forbidden", "eval/benign", "eval/howto"):
        rows = evaluation_sets(world, SEED)[name]
        share = sum(held_out(row["messages"][-2]["content"]) for row in rows) / len(rows)
        assert share == pytest.approx(0.5, abs=0.02)
