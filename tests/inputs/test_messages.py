"""Messages in their normal form: parts, tool calls and weights; what Arrow pads never reaches a template."""

import json

import pytest
from datasets import Dataset

from geomkit.errors import DataError
from geomkit.inputs.examples import load_examples
from geomkit.inputs.messages import conversation, conversations, normal_message, normal_tools
from geomkit.inputs.tokens import encode, encode_prompts
from tests.helpers.chat import byte_tokenizer, dialogue, scored_texts, shipped_template

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def calling(arguments, **fields):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "22 C"},
            {"role": "assistant", "content": "It is 22 C."},
        ],
        "tools": [TOOL],
    } | fields


ROWS = [calling({"city": "Rome"}), calling({"zip": "00100", "unit": None})]


def written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return load_examples(path)


@pytest.mark.parametrize(
    "template", ["qwen2_5", "qwen3", "llama3_1", "glm4moe", "nemotron_3_nano", "deepseekv3", "qwen3_training"]
)
def test_tools_and_calls_reach_the_template_as_the_file_has_them(tmp_path, template):
    tokenizer = byte_tokenizer(shipped_template(template))
    has_tools = template != "deepseekv3"
    examples = written(tmp_path) if has_tools else written(tmp_path).remove_columns("tools")
    for index, row in enumerate(encode(tokenizer, examples)):
        call, answer = scored_texts(tokenizer, row)
        before = tokenizer.decode(row.input_ids).split("Weather?")[0]
        assert "weather" in call
        assert ("Rome", "00100")[index] in call
        assert ("zip", "city")[index] not in call
        assert ("null" in call or "None" in call) == bool(index)  # a null of the file is an argument
        assert "It is 22 C." in answer
        assert "Weather?" not in call + answer
        assert "22 C" not in call
        assert ("weather" in before) == has_tools


def test_what_arrow_pads_is_taken_out():
    """A data set pads the arguments of every call with those of the other calls."""
    padded = Dataset.from_list([calling({"city": "Rome"}), calling({"zip": "00100"})])
    assert padded[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "zip": None}
    for examples in (padded, load_examples(padded)):
        first, second = conversations(examples)
        assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
        assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"zip": "00100"}
        assert "tool_calls" not in first.messages[0]
        assert first.tools is not None
        assert "None" not in str(first.tools)


def test_a_template_without_tools_refuses_the_row(tmp_path):
    examples = written(tmp_path)
    tokenizer = byte_tokenizer(shipped_template("phi3"))
    with pytest.raises(DataError, match=r"^example 0: the chat template does not write"):
        encode(tokenizer, examples)
    plain = dialogue("Hi", "Hello.").add_column("tools", [json.dumps([TOOL])])
    with pytest.raises(DataError, match=r"^example 0: the chat template does not write the tools of this conversation"):
        encode(tokenizer, plain)
    with pytest.raises(DataError, match=r"^prompt 0: the chat template does not write the tools"):
        encode_prompts(tokenizer, [plain[0]["messages"][:1]], plain["tools"])
    calls = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    with pytest.raises(DataError, match=r"does not write the tool calls of message 1 \(assistant\)"):
        encode(byte_tokenizer(calls), examples.remove_columns("tools"))


def test_calls_are_taken_in_every_form():
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    expected = [{"type": "function", "function": function}]
    for message in (
        {"role": "assistant", "content": None, "tool_calls": expected},
        {"role": "assistant", "content": "", "tool_calls": json.dumps(expected)},
        {"role": "assistant", "content": None, "function_call": function},
        {"from": "function_call", "value": json.dumps(function)},
    ):
        normal = normal_message(message)
        assert (normal["role"], normal["content"]) == ("assistant", "")
        assert json.loads(normal["tool_calls"]) == expected
        assert normal_message(normal) == normal
    assert normal_tools(json.dumps([TOOL])) == normal_tools([TOOL])
    assert normal_tools("") is normal_tools([]) is normal_tools(None) is None


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "Hi", "image_url": None}, {"type": "text", "text": " there"}]
    assert normal_message({"role": "user", "content": parts})["content"] == "Hi there"


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("Hi", "expected messages with a text 'role' and 'content', found 'Hi'"),
        ({"role": "user"}, "expected messages with a text 'role' and 'content'"),
        ({"role": "user", "content": 3}, "found the content 3"),
        (
            {"role": "user", "content": [{"type": "image", "url": "x"}]},
            "expected parts of text, found the part .*image",
        ),
        ({"role": "user", "content": "Hi", "images": ["x"]}, "expected text only, found the field 'images'"),
        ({"role": "alien", "content": "Hi"}, "expected the role system, user, assistant or tool, found 'alien'"),
        (
            {"role": "assistant", "content": None, "tool_calls": []},
            "expected words or tool calls",
        ),
        ({"role": "assistant", "tool_calls": [{"x": 1}]}, "expected a tool call with the 'name' of a function"),
        ({"role": "assistant", "tool_calls": "{"}, "expected 'tool_calls' as JSON, found '{'"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "expected 'tool_calls' to be a list of objects"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "expected a weight of 0 or 1, found"),
        ({"role": "assistant", "content": "a", "weight": 1, "train": False}, "expected a weight of 0 or 1, found"),
        ({"role": "user", "content": "a", "train": True}, "expected weights on messages of the assistant only"),
    ],
)
def test_a_message_that_cannot_be_used_is_refused(message, found):
    with pytest.raises(DataError, match=found):
        normal_message(message)
    with pytest.raises(DataError, match=r"the list, row 1: "):
        load_examples([dialogue("Hi", "Hello.")[0], {"messages": [{"role": "user", "content": "a"}, message]}])


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0}])
@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_training"])
def test_a_turn_of_weight_zero_is_context(field, template):
    messages = dialogue("Hi", "Hello.", "Go", "Bye.")[0]["messages"]
    messages[1] |= field
    tokenizer = byte_tokenizer(shipped_template(template))
    for examples in (load_examples([{"messages": messages}]), Dataset.from_list([{"messages": messages}])):
        (row,) = encode(tokenizer, examples)
        assert [text.strip() for text in scored_texts(tokenizer, row)] == ["Bye.<|im_end|>"]
    messages[3] |= field
    with pytest.raises(DataError, match="example 0: expected an assistant message to take the loss on, found weight 0"):
        encode(tokenizer, load_examples([{"messages": messages}]))


def test_weights_need_markers_that_can_be_told_apart():
    one_block = (
        "{% generation %}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% endgeneration %}"
    )
    messages = dialogue("Hi", "Hello.", "Go", "Bye.")[0]["messages"]
    messages[1]["weight"] = 0
    with pytest.raises(DataError, match=r"example 0: expected markers around each of 2 answers, .* found 1 markers"):
        encode(byte_tokenizer(one_block), load_examples([{"messages": messages}]))


def test_fields_that_a_template_does_not_write_are_refused():
    rows = dialogue("Hi", "Hello.")[0]["messages"]
    tokenizer = byte_tokenizer(shipped_template("phi3"))
    named = [rows[0] | {"name": "Ann"}, rows[1]]
    with pytest.raises(DataError, match=r"example 0: the chat template does not write the name 'Ann' of message 0"):
        encode(tokenizer, load_examples([{"messages": named}]))
    thinking = [rows[0], rows[1] | {"reasoning_content": "greet"}]
    with pytest.raises(DataError, match=r"example 0: .* leaves out what the assistant thinks in message 1"):
        encode(tokenizer, load_examples([{"messages": thinking}]))
    qwen = byte_tokenizer(shipped_template("qwen3"))
    (row,) = encode(qwen, load_examples([{"messages": thinking}]))
    assert scored_texts(qwen, row) == ["<think>\ngreet\n</think>\n\nHello.<|im_end|>"]


def test_a_malformed_example_is_named_when_it_is_read():
    with pytest.raises(DataError, match="example 0: expected a non-empty list of messages"):
        list(conversations(Dataset.from_list([{"messages": []}])))
    assert conversation(dialogue("Hi", "Hello.")[0]["messages"]).scored == (False, True)
