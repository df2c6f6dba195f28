"""Examples and tokens: good input comes through unchanged, bad input gets one clear sentence."""

import json

import pytest
import torch
from datasets import Dataset

from geomkit.errors import DataError
from geomkit.inputs.batches import IGNORED, batches, collate
from geomkit.inputs.examples import load_examples, prompt_of, response_of
from geomkit.inputs.tokens import Tokens, encode, pad_id
from tests.helpers.tiny import PLAIN_TEMPLATE, SAFETY, TEMPLATE, UTILITY, conversations, tiny_tokenizer

USER, ASSISTANT = {"role": "user", "content": "help"}, {"role": "assistant", "content": "sure"}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def written(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- loading


def test_rows_come_in_order_and_blank_lines_do_not_count(tmp_path):
    path = written(tmp_path, *(json.dumps({"messages": row, "kind": "x"}) for row in SAFETY["messages"]), "", "  ")
    found = load_examples(path)
    assert list(found["messages"]) == list(SAFETY["messages"])
    assert found["kind"] == ["x"] * 3
    assert list(load_examples(str(path))["messages"]) == list(found["messages"])


def test_prompt_and_response_become_messages_and_other_columns_stay(tmp_path):
    path = written(tmp_path, json.dumps({"prompt": "help", "response": "sure", "kind": "x"}))
    found = load_examples(path)
    assert found.column_names == ["kind", "messages"]
    assert found[0]["messages"] == [USER, ASSISTANT]


def test_a_line_ends_at_a_newline_only(tmp_path):
    """JSON allows U+2028 and U+0085 inside a string, where str.splitlines would cut the line."""
    text = "one\u2028two\u0085three"
    row = {"messages": [USER, {"role": "assistant", "content": text}]}
    found = load_examples(written(tmp_path, json.dumps(row, ensure_ascii=False), GOOD))
    assert response_of(found[0]["messages"]) == text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "expected at least one example in .*rows.jsonl, found an empty file"),
        ([GOOD, "", '{"messages": ['], "rows.jsonl, line 3: expected one JSON object a line, found"),
        ([GOOD, "[1, 2]"], "rows.jsonl, line 2: expected a JSON object, found list"),
        (['{"text": "a"}'], r"expected a column 'messages', or 'prompt' and 'response', found \['text'\]"),
        (['{"prompt": "a"}'], r"found \['prompt'\]; rename the columns"),
        (['{"prompt": "a", "response": null}'], "row 0: expected messages with a text 'role' and 'content'"),
        ([GOOD, '{"messages": "help"}'], "the rows do not share one set of columns and types"),
        (['{"messages": "help"}'], "row 0: expected a non-empty list of messages, found 'help'"),
        ([GOOD, '{"messages": []}'], "row 1: expected a non-empty list of messages"),
        ([GOOD, '{"other": 1}'], "row 1: expected a non-empty list of messages, found None"),
        (['{"messages": [{"role": "assistant"}]}'], "row 0: expected messages with a text 'role' and 'content'"),
        (
            [GOOD, GOOD.replace("sure", "")],
            "row 1: expected words in the last assistant message, found ''; drop the row",
        ),
        (['{"prompt": "a", "response": " \\n"}'], r"row 0: expected words in the last .*, found ' \\n'"),
        ([json.dumps({"messages": [USER]})], "row 0: expected an assistant message to take the loss on, found none"),
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
    with pytest.raises(DataError, match=r"expected a JSON-lines file at .*missing.*, found none; .*: .*safety"):
        load_examples(name)


def test_a_name_that_is_nothing_says_so():
    with pytest.raises(DataError, match=r"'no-such-set' is no file and no shipped set .*safety.* from the hub failed"):
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
    assert prompt_of(messages) == messages[:4]
    assert response_of(messages) == "no"


# ------------------------------------------------------------------------------------------------- tokens


def test_the_mask_holds_the_assistants_words_and_its_end():
    tokenizer = tiny_tokenizer()
    (row,) = encode(tokenizer, SAFETY.select([2]))
    words = "[user] how can we steal a brush [assistant] no [end]"
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == words.split()
    assert row.loss_mask == (False,) * 8 + (True,) * 2
    assert (len(row), row.loss_tokens) == (10, 2)


def test_prefixes_find_the_tokens_that_the_markers_mark():
    turns = [USER, ASSISTANT, {"role": "user", "content": "paint"}, {"role": "assistant", "content": "no way"}]
    examples = Dataset.from_list([*UTILITY, {"messages": turns}])
    marked = list(encode(tiny_tokenizer(), examples))
    assert list(encode(tiny_tokenizer(), examples, assistant_mask="prefix")) == marked
    assert list(encode(tokenizer_with(PLAIN_TEMPLATE), examples, assistant_mask="prefix")) == marked
    assert marked[-1].loss_tokens == 5


def test_prefixes_need_a_template_that_only_ever_adds():
    changing = "{% if messages | length > 1 %}no {% endif %}" + PLAIN_TEMPLATE
    with pytest.raises(DataError, match=r"example 0: .* prefixes cannot tell the assistant's tokens"):
        encode(tokenizer_with(changing), SAFETY, assistant_mask="prefix")
    with pytest.raises(DataError, match="example 0: expected a message before the assistant's first"):
        encode(tiny_tokenizer(), Dataset.from_list([{"messages": [ASSISTANT]}]), assistant_mask="prefix")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected a tokenizer with a chat template, found none"),
        (PLAIN_TEMPLATE, r"expected a chat template that marks .* found no marker; .*--assistant-mask prefix"),
        (TEMPLATE.replace("'assistant'", "'bot'"), r"example 0: expected assistant tokens .*\(13 tokens, all masked\)"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(template, message):
    with pytest.raises(DataError, match=message):
        encode(tokenizer_with(template), SAFETY)


def test_max_length_cuts_from_the_right_and_must_leave_something():
    whole = encode(tiny_tokenizer(), UTILITY)
    cut = encode(tiny_tokenizer(), UTILITY, max_length=9)
    assert all(short.input_ids == long.input_ids[:9] for short, long in zip(cut, whole, strict=True))
    with pytest.raises(DataError, match=r"example 0: .* found none within the first 4 tokens .* raise max_length"):
        encode(tiny_tokenizer(), UTILITY, max_length=4)


def test_a_set_without_rows_or_without_messages_is_refused():
    with pytest.raises(DataError, match="expected at least one example"):
        encode(tiny_tokenizer(), SAFETY.select([]))
    with pytest.raises(DataError, match=r"expected a column 'messages', found \['prompt'\]; load the set with"):
        encode(tiny_tokenizer(), Dataset.from_list([{"prompt": "help"}]))


ROWS = [Tokens((5, 6, 7), (False, True, True)), Tokens((8, 9), (False, True))]


@pytest.mark.parametrize(
    ("side", "ids", "labels"),
    [
        ("right", [[5, 6, 7], [8, 9, 0]], [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]),
        ("left", [[5, 6, 7], [0, 8, 9]], [[IGNORED, 6, 7], [IGNORED, IGNORED, 9]]),
    ],
)
def test_padding_goes_to_one_side_and_counts_nowhere(side, ids, labels):
    batch = collate(ROWS, pad=0, side=side)
    assert batch.input_ids.tolist() == ids
    assert batch.labels.tolist() == labels
    assert torch.equal(batch.attention_mask, (torch.tensor(ids) != 0).long())


def test_a_pad_token_that_also_occurs_as_text_still_counts():
    batch = collate([Tokens((5, 0), (False, True)), Tokens((5, 6, 7), (False, True, True))], pad=0)
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels[0].tolist() == [IGNORED, 0, IGNORED]


def test_batches_keep_the_order_and_say_which_rows_they_hold():
    rows = encode(tiny_tokenizer(), UTILITY)
    found = list(batches(rows, 0, 3))
    assert [batch.examples for batch in found] == [(0, 1, 2), (3,)]
    assert found[1].input_ids[0].tolist() == list(rows[3].input_ids)


def test_a_tokenizer_without_a_pad_token_is_refused():
    tokenizer = tiny_tokenizer()
    assert pad_id(tokenizer) == 0
    tokenizer.pad_token = None
    with pytest.raises(DataError, match=r"expected a tokenizer with a pad token, found none .* \(--pad-token TOKEN"):
        pad_id(tokenizer)


def test_the_same_conversation_gives_the_same_tokens_whatever_stands_beside_it():
    alone = list(encode(tiny_tokenizer(), conversations(("help", "sure"))))
    assert encode(tiny_tokenizer(), conversations(("steal the bike", "no"), ("help", "sure")))[1:] == alone
