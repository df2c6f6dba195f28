"""Each row format becomes the same conversation; a column that carries meaning is used, or refused with its row."""

import logging
import math

import pandas as pd
import pytest

from geomkit.errors import DataError
from geomkit.inputs.adapters import FORMATS
from geomkit.inputs.examples import load_examples

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PAIR = [USER, ASSISTANT]

ROWS = {
    "messages": [({"messages": PAIR}, PAIR)],
    "ShareGPT": [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, PAIR),
        ({"conversations": PAIR}, PAIR),
    ],
    "preference pairs": [
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, PAIR),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, PAIR),
        ({"question": "Hi", "chosen": "Hello", "rejected": "No"}, PAIR),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, PAIR),
        ({"prompt": "Hi", "chosen": PAIR, "rejected": PAIR}, PAIR),
    ],
    "Alpaca": [
        ({"instruction": "Hi", "input": "", "output": "Hello"}, PAIR),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, [("user", "Add\n\n1, 2"), ("assistant", "3")]),
    ],
    "Dolly": [
        ({"instruction": "Hi", "context": "", "response": "Hello"}, PAIR),
        (
            {"instruction": "Who?", "context": "I am.", "response": "You"},
            [("user", "Who?\n\nI am."), ("assistant", "You")],
        ),
    ],
    "prompt and completion": [
        ({"prompt": "Hi", "completion": "Hello"}, PAIR),
        ({"prompt": [USER], "completion": [ASSISTANT]}, PAIR),
    ],
    "prompt and response": [
        ({"prompt": "Hi", "response": "Hello"}, PAIR),
        ({"prompt": [USER], "response": [ASSISTANT]}, PAIR),
    ],
    "question and answer": [({"question": "Hi", "answer": "Hello"}, PAIR)],
    "prompts": [({"prompt": "Hi", "label": "safe"}, [USER])],
    "questions": [({"question": "Hi"}, [USER])],
    "instructions": [({"instruction": "Add", "input": "1, 2"}, [("user", "Add\n\n1, 2")])],
    "goals": [({"Goal": "Hi", "Target": "Sure", "Behavior": "Greeting"}, [USER])],
    "behaviours": [
        ({"Behavior": "Hi", "ContextString": ""}, [USER]),
        ({"Behavior": "Hi", "ContextString": "Text"}, [("user", "Text\n\n---\n\nHi")]),
    ],
    "forbidden prompts": [({"forbidden_prompt": "Hi", "category": "x"}, [USER])],
}


def test_every_format_of_the_table_is_tested():
    assert [form.name for form in FORMATS] == list(ROWS)


@pytest.mark.parametrize(("row", "messages"), [case for cases in ROWS.values() for case in cases])
def test_a_row_becomes_its_conversation(row, messages):
    expected = [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in messages]
    assert load_examples([row])[0]["messages"] == expected


def test_columns_that_are_no_part_of_the_conversation_stay():
    (row,) = load_examples([{"Goal": "Hi", "Target": "Sure", "Category": "x"}])
    assert row == {"Target": "Sure", "Category": "x", "messages": [USER]}


def test_columns_are_named_by_the_user():
    row = {"frage": "Hi", "antwort": "Hello", "rolle": "Be kind.", "text": "Ctx", "damals": [["A", "B"]], "prompt": "x"}
    columns = {"prompt": "frage", "response": "antwort", "system": "rolle", "context": "text", "history": "damals"}
    (found,) = load_examples([row], columns=columns)
    assert [(turn["role"], turn["content"]) for turn in found["messages"]] == [
        ("system", "Be kind."),
        ("user", "A"),
        ("assistant", "B"),
        ("user", "Hi\n\nCtx"),
        ("assistant", "Hello"),
    ]
    assert found["prompt"] == "x"
    assert load_examples([{"dialog": PAIR}], columns={"messages": "dialog"})[0]["messages"] == PAIR
    assert load_examples([row], columns={"prompt": "frage"})[0]["messages"] == [USER]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "goal"}, r"the list: expected a column 'goal', found \['frage'\]"),
        ({"question": "frage"}, "expected columns for messages, prompt, .*, found one for 'question'"),
        ({"response": "frage"}, "expected a column for the prompt or the messages, found none"),
    ],
)
def test_columns_that_are_not_there_are_refused(columns, message):
    with pytest.raises(DataError, match=message):
        load_examples([{"frage": "Hi"}], columns=columns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "answer": "Hello"}, "expected to know the answers to 'prompt', found 'answer'; say which"),
        (
            {"prompt": "Hi", "completion": "a", "response": "b"},
            "expected the columns of one format, found those of prompt and completion or of prompt and response",
        ),
        ({"chosen": "Hello"}, "row 0: expected a prompt, or turns of Human and Assistant in 'chosen'"),
        ({"messages": PAIR, "prompt": "Other"}, "row 0: expected 'prompt' to say what 'messages' says, found 'Other'"),
        ({"messages": PAIR, "prompt": "Hi", "response": "No"}, "row 0: expected 'prompt' to say .*, found 'No'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "row 0: expected the role system, user, .*'alien'"),
        (
            {"prompt": "Hi", "response": "a", "images": ["x.png"]},
            "row 0: expected no column 'images', .* drop the column",
        ),
        ({"prompt": "Hi", "response": "a", "documents": [{"text": "x"}]}, "row 0: expected no column 'documents'"),
        (
            {"prompt": "Hi", "response": "a", "weight": 0.5},
            "row 0: expected rows that count alike, found the weight 0.5",
        ),
        ({"prompt": "Hi", "response": "a", "history": "x"}, "row 0: expected pairs of texts or messages in 'history'"),
        ({"instruction": "Double it.", "input": 21, "output": "42"}, "row 0: expected a text in 'input', found 21"),
        ({"prompt": "Hi", "response": "a", "system": ["x"]}, "row 0: expected parts of text|row 0: .*'content'"),
        (
            {"messages": [{"role": "system", "content": "A"}, *PAIR], "system": "B"},
            "row 0: expected one system prompt, found 'A' and, in its column, 'B'",
        ),
    ],
)
def test_a_column_that_cannot_be_used_is_refused(row, message):
    if row.get("system") == ["x"]:  # a list of parts of text is a text
        assert load_examples([row])[0]["messages"][0] == {"role": "system", "content": "x"}
        return
    with pytest.raises(DataError, match=message):
        load_examples([row])


@pytest.mark.parametrize("missing", [None, math.nan, "", " ", [], {}, pd.NA])
def test_a_context_that_says_nothing_is_left_out(missing):
    (row,) = load_examples([{"instruction": "Sing.", "input": missing, "output": "La."}])["messages"]
    assert row == [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]


def test_messages_that_say_what_other_columns_say_are_taken():
    found = load_examples(
        [{"messages": PAIR, "prompt": "Hi", "system": None, "history": [], "images": None, "weight": 1}]
    )
    assert found[0]["messages"] == PAIR
    both = [{"messages": PAIR, "prompt": "Other", "response": "Thing"}]
    assert load_examples(both, columns={"messages": "messages"})[0]["messages"] == PAIR


def test_a_system_prompt_and_earlier_turns_come_first():
    rows = [
        {"system": "Be kind.", "history": [["A", "B"]], "prompt": "Hi", "response": "Hello"},
        {"system": "", "history": None, "prompt": "Hi", "response": "Hello"},
        {"system_prompt": "Be kind.", "history": PAIR, "prompt": "Hi", "response": "Hello"},
    ]
    assert [len(load_examples([row])[0]["messages"]) for row in rows] == [5, 2, 5]
    assert [turn["content"] for turn in load_examples(rows[:1])[0]["messages"]] == ["Be kind.", "A", "B", "Hi", "Hello"]
    given = [{"messages": [{"role": "system", "content": "A"}, *PAIR], "system": "A"}]
    assert len(load_examples(given)[0]["messages"]) == 3


def test_the_log_says_what_is_not_used(caplog):
    caplog.set_level(logging.INFO)
    load_examples([{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}])
    load_examples([{"goal": "Hi", "target": "Sure"}])
    assert "those of 'rejected' are not used" in caplog.messages[0]
    assert "the column 'target' is not taken as the answer" in caplog.messages[1]
