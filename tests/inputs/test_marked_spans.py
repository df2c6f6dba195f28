"""Markers that a user sets wrong are refused with the row; what templates in use mark besides the answer is not."""

import logging
import re

import pytest
from datasets import Dataset

from geomkit.errors import DataError
from geomkit.inputs.tokens import encode
from tests.helpers.chat import byte_tokenizer, dialogue, scored_texts, shipped_template, shipped_templates

HEAD, END = "<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n"
WRITTEN = HEAD + "{{ m['content'] }}" + END
ANSWER = "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"


def template(body, others=None):
    """A template in the style of ChatML with the given text for the assistant's messages, and for the others'."""
    others = others or WRITTEN
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + body + "{% else %}" + others + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


ROWS = Dataset.from_list([*dialogue("Hi", "Hello."), *dialogue("How are you", "Fine.", "And I?", "How are you")])


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (
            template(WRITTEN, HEAD + "{% generation %}{{ m['content'] }}{% endgeneration %}" + END),
            r"^example 0: expected .* around answers only, found the user's message 0, 'Hi', inside them; correct",
        ),
        (
            "{% generation %}" + template(WRITTEN) + "{% endgeneration %}",
            r"^example 0: .* found the user's message 0, 'Hi', inside them.*assistant_mask=\"prefix\"",
        ),
        (
            template("{% generation %}" + HEAD + "{% endgeneration %}{{ m['content'] }}" + END),
            r"^example 0: expected \{% generation %\} markers around the answer 'Hello.' of message 1, found them ",
        ),
        (
            template(HEAD + "{% generation %}<|im_end|>{% endgeneration %}{{ m['content'] }}" + END),
            r"around the answer 'Hello.'",
        ),
    ],
    ids=["the user's", "everything", "the header", "the end"],
)  # fmt: skip
def test_wrong_markers_are_refused_with_the_row(chat_template, message):
    with pytest.raises(DataError, match=message):
        encode(byte_tokenizer(chat_template), ROWS)


def test_only_the_last_answer_marked_is_refused_where_a_row_has_two():
    """A common mistake; the first row has one answer and passes."""
    body = (
        "{% if loop.last %}" + HEAD + ANSWER + "{% else %}" + HEAD + "{{ m['content'] }}" + END + "{% endif %}"
    )  # fmt: skip
    with pytest.raises(DataError, match=r"^example 1: expected .* markers around the answer 'Fine.' of message 1"):
        encode(byte_tokenizer(template(body)), ROWS)


@pytest.mark.parametrize(
    "body",
    [HEAD + ANSWER, "{% generation %}" + HEAD + "{{ m['content'] }}<|im_end|>\n{% endgeneration %}"],
    ids=["the answer and its end", "also header and line feed"],
)
def test_right_markers_pass_also_where_an_answer_repeats_the_question(body):
    tokenizer = byte_tokenizer(template(body))
    for row, answers in zip(encode(tokenizer, ROWS), (["Hello."], ["Fine.", "How are you"]), strict=True):
        texts = scored_texts(tokenizer, row)
        assert len(texts) == len(answers)
        assert all(answer in text for answer, text in zip(answers, texts, strict=True))


def test_markers_without_the_end_of_the_turn_are_said_once(caplog):
    body = HEAD + "{% generation %}{{ m['content'] }}{% endgeneration %}" + END
    with caplog.at_level(logging.INFO, logger="geomkit"):
        encode(byte_tokenizer(template(body)), ROWS)
        encode(byte_tokenizer(template(body)), ROWS)
    said = [line for line in caplog.messages if "leave out the end of the turn, '<|im_end|>'" in line]
    assert len(said) == 1


MARKED = [name for name in shipped_templates() if re.search(r"\{%-?\s*generation", shipped_template(name))]


@pytest.mark.parametrize("name", MARKED)
def test_the_templates_of_trl_with_markers_pass(name):
    (row,) = encode(byte_tokenizer(shipped_template(name)), dialogue("Hi there", "Good day.", "And?", "Hi there"))
    assert row.loss_tokens > 0
