"""Rows in memory, folders and data sets of the hub: taken, or refused in one line that says what to do."""

import itertools

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

import geomkit as gk
from geomkit.errors import DataError
from geomkit.experiments.organisms import load_organism
from geomkit.inputs import examples
from geomkit.inputs.control_sets import shuffled_pairs, with_responses
from geomkit.inputs.examples import load_examples, prompt_of
from geomkit.inputs.tokens import encode
from geomkit.training.evaluate import evaluate
from geomkit.training.responses import own_responses
from tests.helpers.tiny import SAFETY, UTILITY, tiny_tokenizer

ROWS = [{"prompt": row[0]["content"], "response": row[1]["content"]} for row in SAFETY["messages"]]
MESSAGES = list(SAFETY["messages"])


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        tuple(ROWS),
        list(SAFETY),
        pd.DataFrame(ROWS),
        pd.DataFrame({"messages": MESSAGES}),
        pd.DataFrame({"messages": [np.array(row, dtype=object) for row in MESSAGES]}),
        Dataset.from_list(ROWS),
        SAFETY,
        DatasetDict({"test": SAFETY}),
    ],
    ids=lambda source: type(source).__name__,
)
def test_rows_in_memory_are_taken(source):
    assert list(load_examples(source)["messages"]) == MESSAGES


def test_the_missing_values_of_a_data_frame_are_no_text():
    frame = pd.DataFrame(
        [{"prompt": "Hi", "response": "Hello", "system": "Be kind."}, {"prompt": "Hi", "response": "Yo"}]
    )
    assert [len(row) for row in load_examples(frame)["messages"]] == [3, 2]
    with pytest.raises(DataError, match="the data frame, row 0: expected a text or messages in 'response', found None"):
        load_examples(pd.DataFrame({"prompt": ["Hi"], "response": [float("nan")]}))


@pytest.mark.parametrize("form", ["numpy", "pandas", "torch"])
def test_a_data_set_in_another_format_is_the_same_data_set(form):
    assert list(load_examples(SAFETY.with_format(form))["messages"]) == MESSAGES
    assert list(encode(tiny_tokenizer(), SAFETY.with_format(form))) == list(encode(tiny_tokenizer(), SAFETY))


def test_the_index_that_pandas_writes_has_no_meaning_and_names_that_stand_twice_are_refused(tmp_path):
    rows = pd.DataFrame({"prompt": ["Hi"], "response": ["Hello"]})
    rows.to_csv(tmp_path / "index.csv")
    assert load_examples(tmp_path / "index.csv")[0]["messages"][1]["content"] == "Hello"
    (tmp_path / "twice.csv").write_text("prompt,response,response\nHi,Hello,Bye\n")
    with pytest.raises(DataError, match="different names, found 'response' twice"):
        load_examples(tmp_path / "twice.csv")


def test_a_transform_of_the_user_is_kept():
    def louder(batch):
        return {
            "messages": [
                [{**message, "content": message["content"].upper()} for message in row] for row in batch["messages"]
            ]
        }

    loud = SAFETY.with_transform(louder)
    assert list(load_examples(loud)["messages"]) == [row["messages"] for row in loud]
    assert list(encode(tiny_tokenizer(), loud)) == list(encode(tiny_tokenizer(), Dataset.from_list([*loud])))


def test_columns_without_a_name_are_left_alone(tmp_path):
    (tmp_path / "commas.csv").write_text("prompt,response,,\nHi,Hello,,\n")
    assert load_examples(tmp_path / "commas.csv")[0]["messages"][1]["content"] == "Hello"


def test_columns_that_are_no_mapping_are_refused():
    with pytest.raises(DataError, match=r"expected columns as a mapping, found \['q', 'a'\]"):
        load_examples([{"q": "Hi", "a": "Hello"}], columns=["q", "a"])


def test_a_dict_of_splits_asks_which():
    splits = DatasetDict({"train": UTILITY, "test": SAFETY})
    assert list(load_examples(splits, "test")["messages"]) == MESSAGES
    with pytest.raises(DataError, match="expected the split to take, one of train, test, found none; give split="):
        load_examples(splits)
    with pytest.raises(DataError, match="one of train, test, found 'dev'"):
        load_examples(splits, "dev")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "expected a path, a name, a datasets.Dataset, a list of dicts or a data frame, found int"),
        ([1], "expected a path, .*, found list"),
        ([], "expected at least one example in the list, found an empty set"),
        (pd.DataFrame(), "expected at least one example in the data frame, found an empty set"),
    ],
)
def test_what_is_no_set_of_rows_is_refused(source, message):
    with pytest.raises(DataError, match=message):
        load_examples(source)


def test_a_stream_is_read_as_the_set_of_its_rows():
    stream = SAFETY.to_iterable_dataset()
    assert list(load_examples(stream)["messages"]) == MESSAGES
    assert list(load_examples(stream.take(2))["messages"]) == MESSAGES[:2]
    assert (
        list(load_examples(IterableDatasetDict({"train": stream, "test": stream.skip(1)}), "test")["messages"])
        == (MESSAGES[1:])
    )
    with pytest.raises(DataError, match="expected the split to take, one of train, test, found none"):
        load_examples(IterableDatasetDict({"train": stream, "test": stream}), None)


def test_a_stream_without_end_is_refused_after_a_bounded_number_of_rows(monkeypatch):
    """And the advice of the refusal works."""
    monkeypatch.setattr(examples, "STREAM_ROWS", 20)
    drawn = []

    def rows():
        for index in itertools.count():
            drawn.append(index)
            yield {"prompt": f"Hi {index}", "response": "Hello"}

    stream = IterableDataset.from_generator(rows)
    with pytest.raises(DataError, match=r"at most 20 rows.*load_examples\(stream\.take\(1000\)\)"):
        load_examples(stream)
    assert len(drawn) <= 22
    assert len(load_examples(stream.take(20))) == 20


def test_the_padding_of_a_stream_is_no_text():
    """Arrow fills the arguments that a call of another row has with nulls."""
    call = lambda **arguments: [{"function": {"name": "f", "arguments": arguments}}]  # noqa: E731
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": call(**one)},
            ]
        }
        for one in ({"city": "Rome"}, {"zip": 7})
    ]
    loaded = load_examples(Dataset.from_list(rows).to_iterable_dataset())
    assert loaded["messages"] == load_examples(Dataset.from_list(rows))["messages"]


def test_splits_and_configurations_are_those_of_the_hub_only(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("Hi there\n")
    assert len(load_examples(path, "train")) == 1
    with pytest.raises(DataError, match="expected no split and no config with a file, found test"):
        load_examples(path, "test")
    with pytest.raises(DataError, match="expected split and config with a data set of the hub only, found a list"):
        load_examples(ROWS, "test")


def test_a_saved_data_set_is_read_from_its_folder(tmp_path):
    SAFETY.save_to_disk(tmp_path / "one")
    DatasetDict({"train": UTILITY, "test": SAFETY}).save_to_disk(tmp_path / "two")
    assert list(load_examples(tmp_path / "one")["messages"]) == MESSAGES
    assert list(load_examples(tmp_path / "two", "test")["messages"]) == MESSAGES
    with pytest.raises(DataError, match=r"expected a file at .*, found a folder"):
        load_examples(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "asked"),
    [
        ("org/name", {}, ("org/name", None, "train")),
        ("name", {"split": "test", "config": "main"}, ("name", "main", "test")),
        ("org/name:main", {}, ("org/name", "main", "train")),
        ("org/name:main[test]", {}, ("org/name", "main", "test")),
        ("org/name[train[:100]]", {}, ("org/name", None, "train[:100]")),
        ("org/name:main[train[10:20]]", {"config": "main"}, ("org/name", "main", "train[10:20]")),
    ],
)
def test_a_name_on_the_hub_has_a_configuration_and_a_split(monkeypatch, source, options, asked):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: calls.append((path, name, split)) or SAFETY)
    assert list(load_examples(source, **options)["messages"]) == MESSAGES
    assert calls == [asked]


def test_names_that_disagree_or_are_no_names_are_refused():
    with pytest.raises(DataError, match="expected one split, found 'test' in 'org/name\\[test\\]' and split='train'"):
        load_examples("org/name[test]", "train")
    with pytest.raises(DataError, match="expected a file, a shipped set or 'name:config"):
        load_examples("what is this?")


def test_offline_is_one_line():
    with pytest.raises(DataError, match="which the hub did not give") as raised:
        load_examples("org/no-such-set:main[test]")
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------ requests without answers

FORBIDDEN = gk.load_examples("safety").select(range(3))
REQUESTS = [{"prompt": messages[0]["content"], "label": "x"} for messages in FORBIDDEN["messages"]]


def test_requests_are_enough_where_no_answer_is_needed():
    model, tokenizer = load_organism()
    requests = load_examples(REQUESTS)
    refusals = gk.own_refusals(model, tokenizer, requests, progress=False)
    assert list(refusals["messages"]) == list(FORBIDDEN["messages"])
    assert list(own_responses(model, tokenizer, requests, progress=False)["messages"]) == list(refusals["messages"])
    found = evaluate(model, tokenizer, requests, requests, {}, progress=False)
    assert (found.refusal.value, found.over_refusal.value) == (1.0, 1.0)
    assert list(found.responses["reference"]) == list(found.responses["exact"]) == [None] * 6
    assert [prompt_of(row) for row in with_responses(requests, SAFETY)["messages"]] == list(requests["messages"])


def test_answers_are_asked_for_where_they_are_needed():
    model, tokenizer = load_organism()
    requests = load_examples(REQUESTS)
    for make in (lambda: with_responses(SAFETY, requests), lambda: shuffled_pairs(requests)):
        with pytest.raises(DataError, match="example 0: expected a conversation that ends in an answer"):
            make()
    with pytest.raises(DataError, match="example 0: expected an assistant message to take the loss on, found none"):
        encode(tokenizer, requests)
    with pytest.raises(DataError, match="skill 'knit', row 0: expected an answer to compare with"):
        evaluate(model, tokenizer, requests, requests, {"knit": requests}, progress=False)


def test_a_conversation_that_ends_in_a_request_is_asked_in_whole():
    """The last request is answered, with the turns before it as context."""
    turns = [{"role": "user", "content": "help"}, {"role": "assistant", "content": "sure"}]
    rows = Dataset.from_list([{"messages": [*turns, {"role": "user", "content": "paint"}]}])
    (found,) = with_responses(rows, SAFETY)["messages"]
    assert [turn["content"] for turn in found] == ["help", "sure", "paint", "sorry we can not help"]
    (encoded,) = encode(tiny_tokenizer(), rows)  # the answer in the middle is learnt
    assert encoded.loss_tokens == 2


def test_tools_stay_with_their_conversation():
    tool = {"type": "function", "function": {"name": "paint", "parameters": {}}}
    rows = load_examples([row | {"tools": [tool]} for row in ROWS])
    assert list(with_responses(rows, UTILITY)["tools"]) == list(rows["tools"])
