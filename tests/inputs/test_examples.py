"""Loading examples: good input comes through unchanged, bad input gets one clear sentence."""

import json

import pytest

from geomkit.errors import DataError
from geomkit.inputs.examples import final_answer, load_examples, prompt_of, required_final_answer
from tests.helpers.tiny import SAFETY

USER, ASSISTANT = {"role": "user", "content": "help"}, {"role": "assistant", "content": "sure"}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})


def written(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_come_in_order_and_blank_lines_do_not_count(tmp_path):
    path = written(tmp_path, *(json.dumps({"messages": row, "kind": "x"}) for row in SAFETY["messages"]), "", "  ")
    result = load_examples(path)
    assert list(result["messages"]) == list(SAFETY["messages"])
    assert result["kind"] == ["x"] * 3
    assert list(load_examples(str(path))["messages"]) == list(result["messages"])


def test_prompt_and_response_become_messages_and_other_columns_stay(tmp_path):
    path = written(tmp_path, json.dumps({"prompt": "help", "response": "sure", "kind": "x"}))
    result = load_examples(path)
    assert result.column_names == ["kind", "messages"]
    assert result[0]["messages"] == [USER, ASSISTANT]


def test_a_line_ends_at_a_newline_only(tmp_path):
    """JSON allows U+2028 and U+0085 inside a string, where str.splitlines would cut the line."""
    text = "one\u2028two\u0085three"
    row = {"messages": [USER, {"role": "assistant", "content": text}]}
    result = load_examples(written(tmp_path, json.dumps(row, ensure_ascii=False), GOOD))
    assert required_final_answer(result[0]["messages"]) == text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "expected at least one example in .*rows.jsonl, found an empty file"),
        ([GOOD, "", '{"messages": ['], "rows.jsonl, line 3: expected one JSON object a line, found"),
        ([GOOD, "[1, 2]"], "rows.jsonl, line 2: expected a JSON object, found list"),
        (
            ['{"text": "a"}'],
            r"expected the columns 'messages'; .*'prompt' and 'response'.*found \['text'\]; .*--columns",
        ),
        (['{"prompt": "a", "response": null}'], "row 0: expected a text or messages in 'response', found None"),
        (['{"prompt": "a", "response": 3}'], "row 0: expected a text or messages in 'response', found 3"),
        ([GOOD, '{"messages": "help"}'], "row 1: expected a non-empty list of messages, found 'help'"),
        (
            ['{"prompt": "a", "x": 1}', '{"prompt": "a", "x": "y"}'],
            "the rows do not share one set of columns and types",
        ),
        (['{"messages": "help"}'], "row 0: expected a non-empty list of messages, found 'help'"),
        ([GOOD, '{"messages": []}'], "row 1: expected a non-empty list of messages"),
        ([GOOD, '{"other": 1}'], "row 1: expected a non-empty list of messages, found None"),
        (
            ['{"messages": [{"role": "assistant"}]}'],
            "row 0: expected words or tool calls in a message",
        ),
        (
            [GOOD, GOOD.replace("sure", "")],
            "row 1: expected words in the last assistant message, found ''; drop the row",
        ),
        (['{"prompt": "a", "response": " \\n"}'], r"row 0: expected words in the last .*, found ' \\n'"),
        (['{"prompt": " "}'], "row 0: expected words in the request, found ' '"),
        ([json.dumps({"messages": [{"role": "system", "content": "a"}]})], "row 0: .* found a system message only"),
    ],
)
def test_a_bad_file_is_named_with_the_place_and_what_was_found(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        load_examples(written(tmp_path, *lines))


def test_text_that_is_not_utf8_is_said(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode().replace(b"sure", b"s\xfcre"))
    with pytest.raises(DataError, match=r"rows.jsonl: expected UTF-8 text"):
        load_examples(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/rows.json"])
def test_a_missing_file_lists_the_shipped_sets(name):
    with pytest.raises(DataError, match=r"expected a file at .*missing.*, found none; .*: .*safety"):
        load_examples(name)


def test_a_name_that_is_nothing_says_so():
    with pytest.raises(DataError, match=r"a shipped set \(.*safety.*\) or .* found 'no-such-set'"):
        load_examples("no-such-set")


def test_an_empty_dataset_is_refused_and_a_ready_one_is_taken():
    assert list(load_examples(SAFETY)["messages"]) == list(SAFETY["messages"])
    with pytest.raises(DataError, match="expected at least one example in the data set, found an empty set"):
        load_examples(SAFETY.select([]))


def test_prompt_and_response_of_several_turns():
    messages = [
        {"role": "system", "content": "we"},
        USER,
        ASSISTANT,
        USER,
        {"role": "assistant", "content": "no"},
        USER,
    ]
    assert prompt_of(messages[:-1]) == messages[:4]
    assert required_final_answer(messages[:-1]) == "no"
    # A conversation that ends in a request has no answer to it.
    assert prompt_of(messages) == messages
    assert final_answer(messages) is None
    with pytest.raises(DataError, match=r"expected a conversation that ends in an answer, found the end .*help"):
        required_final_answer(messages)
