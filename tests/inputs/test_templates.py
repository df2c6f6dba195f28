"""What is scored under the chat templates of real model families, decoded: the answer and the end of its turn."""

import logging
import re
import threading
from datetime import datetime

import pytest
from datasets import Dataset
from transformers.utils import chat_template_utils

from geomkit.errors import DataError
from geomkit.inputs.messages import conversation
from geomkit.inputs.templates import ChatTemplate
from geomkit.inputs.tokens import encode, encode_prompts
from tests.helpers.chat import byte_tokenizer, dialogue, scored_texts, shipped_template, shipped_templates
from tests.helpers.tiny import tiny_tokenizer

MARKED = re.compile(r"\{%-?\s*generation")
FAMILIES = [name for name in shipped_templates() if not MARKED.search(shipped_template(name))]
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>", "diffusion_gemma": "<turn|>", "gemma4": "<turn|>", "gemma": "<end_of_turn>",
    "glm4moe": "", "gptoss": "<|return|>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>",
    "lfm2": "<|im_end|>", "llama3": "<|eot_id|>", "llava_next": "</s>", "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>", "phi3": "<|end|>", "qwen": "<|im_end|>",
}  # fmt: skip
"""The token with which each family ends a turn; GLM writes none, and gpt-oss another in the middle."""

LEADS = {
    "gptoss": "<|channel|>final<|message|>", "muse_glimmer": " to=user<|message|>", "glm4moe": "\n<think></think>\n",
    "nemotron": "<think></think>", "idefics3": " ", "smolvlm": " ", "llava_next": " ",
}  # fmt: skip
"""What the assistant itself writes before its answer in these families: the prompt ends before it."""


def of_family(table, name):
    """Return the entry of the longest key that a name begins with."""
    keys = [key for key in table if name.startswith(key)]
    return table[max(keys, key=len)] if keys else ""


def test_the_installed_templates_are_those_of_twelve_families_and_more():
    assert len({of_family({key: key for key in ENDS}, name) for name in FAMILIES}) >= 12


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_scored_with_the_end_of_its_turn_and_nothing_else(name):
    tokenizer = byte_tokenizer(shipped_template(name))
    answers = ("Good day, you.", "Bye then.")
    (row,) = encode(tokenizer, dialogue("Hi there", answers[0], "And now?", answers[1]))
    runs = scored_texts(tokenizer, row)
    assert len(runs) == 2
    ends = ["<|end|>" if name == "gptoss" else of_family(ENDS, name), of_family(ENDS, name)]
    for text, answer, end in zip(runs, answers, ends, strict=True):
        lead, found, rest = text.partition(answer)
        assert found == answer
        assert rest == end
        # Models that think are asked to think: the prompt ends before the empty thought, which they write.
        empty = "".join(lead.split()) in ("<think></think>", "</think>") and name.startswith("qwen3")
        assert empty or lead == of_family(LEADS, name)


@pytest.mark.parametrize("name", [name for name in FAMILIES if f"{name}_training" in shipped_templates()])
def test_prefixes_score_what_the_markers_of_the_training_templates_mark(name):
    """TRL's training templates have markers; some mark the header of the role or the line feed behind the turn too."""
    examples = dialogue("Hi there", "Good day, you.")
    texts = []
    for template in (name, f"{name}_training"):
        tokenizer = byte_tokenizer(shipped_template(template))
        (row,) = encode(tokenizer, examples)
        texts.append(scored_texts(tokenizer, row)[0].strip())
    ours, marked = texts
    assert ours[ours.index("Good day") :] in marked  # what stands before, such as an empty thought, may differ
    assert "Hi there" not in marked


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_a_model_answers_is_the_beginning_of_what_it_is_trained_on(name):
    tokenizer = byte_tokenizer(shipped_template(name))
    (row,) = encode(tokenizer, dialogue("Hi there", "Good day."))
    (prompt,) = encode_prompts(tokenizer, [[{"role": "user", "content": "Hi there"}]])
    context = list(row.input_ids[: row.loss_mask.index(True)])
    thought = re.compile(r"<think>\s*(</think>\s*)?$")
    assert tokenizer.decode(context) == thought.sub("", tokenizer.decode(prompt)) or context == prompt


# ------------------------------------------------------------------------------------------- what is odd somewhere

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
    "{%- for m in rest %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('conversation roles must alternate user/assistant') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{%- if loop.last or loop.index0 == rest | length - 2 %}"
    "{{- '[INST] ' + ((system + '\n\n') if system is defined else '') + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    "{# <|user|><|system|> #}"
)
LLAMA3 = (
    "{{ bos_token }}{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: "
    "{{ strftime_now('%d %b %Y') }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
HEADERLESS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}{# <|user|><|assistant|> #}"
)


def test_a_template_that_refuses_a_row_is_named_with_the_row():
    rows = Dataset.from_list([*dialogue("Hi", "Hello."), *dialogue("Hi", "Hello.", system="Be terse.")])
    message = r"^example 1: the chat template refuses this conversation: System role not supported; change or drop .*$"
    with pytest.raises(DataError, match=message):
        encode(byte_tokenizer(GEMMA), rows)
    turns = [{"role": role, "content": role} for role in ("user", "user", "assistant")]
    for template in (GEMMA, MISTRAL):
        with pytest.raises(DataError, match=r"^example 0: the chat template refuses .* roles must alternate"):
            encode(byte_tokenizer(template), Dataset.from_list([{"messages": turns}]))
        with pytest.raises(DataError, match=r"^prompt 0: the chat template refuses .* roles must alternate"):
            encode_prompts(byte_tokenizer(template), [turns[:2]])


def test_a_template_that_fails_is_one_line_too():
    with pytest.raises(DataError, match=r"^example 0: the chat template fails on this conversation: TypeError: .*str"):
        encode(byte_tokenizer("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}"), dialogue("Hi", "Hello."))
    with pytest.raises(
        DataError, match="expected a chat template in the language of jinja, found an error in its line 1"
    ):
        encode(byte_tokenizer("{% for m in messages %}"), dialogue("Hi", "Hello."))


def test_a_system_message_that_moves_to_the_last_request_moves_no_answer():
    """The rendering of the first turn alone has the system message in it, that of the whole has it in the last turn."""
    tokenizer = byte_tokenizer(MISTRAL)
    (row,) = encode(tokenizer, dialogue("Hi", "Hello.", "Go", "Bye.", system="Be terse."))
    assert scored_texts(tokenizer, row) == [" Hello.</s>", " Bye.</s>"]


@pytest.mark.parametrize("answer", [" Sorry, no.", "Sorry, no."])
@pytest.mark.parametrize("markers", [True, False])
def test_a_role_token_that_swallows_space_is_not_scored(answer, markers):
    template = PHI3
    if markers:
        template = (
            "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
            "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}\n{% endfor %}"
            "{# <|assistant|><|user|> #}"
        )
    tokenizer = byte_tokenizer(template, rstrip=True)
    (row,) = encode(tokenizer, dialogue("Hi", answer))
    assert scored_texts(tokenizer, row) == ["Sorry, no.<|end|>"]


def test_the_end_of_the_text_is_scored_though_it_is_also_the_padding():
    tokenizer = byte_tokenizer(MISTRAL)
    assert tokenizer.pad_token == tokenizer.eos_token
    (row,) = encode(tokenizer, dialogue("Hi", "Hello."))
    assert row.input_ids[-1] == tokenizer.pad_token_id
    assert row.loss_mask[-1]


def test_a_role_header_is_not_scored_where_the_template_knows_no_generation_prompt():
    tokenizer = byte_tokenizer(HEADERLESS)
    (row,) = encode(tokenizer, dialogue("Hi", "Hello.", "Go", "Bye."))
    assert scored_texts(tokenizer, row) == ["Hello.</s>", "Bye.</s>"]


def test_an_empty_thought_is_scored_where_the_model_writes_it_and_earlier_ones_are_said_to_be_gone(caplog):
    tokenizer = byte_tokenizer(shipped_template("qwen3"))
    caplog.set_level(logging.INFO)
    rows = dialogue("Hi", "<think>greet</think>Hello.", "Go", "<think>part</think>Bye.")
    (row,) = encode(tokenizer, rows)
    assert scored_texts(tokenizer, row) == ["Hello.<|im_end|>", "<think>\npart\n</think>\n\nBye.<|im_end|>"]
    assert sum("leaves out what the assistant thought in earlier turns" in text for text in caplog.messages) == 1
    with pytest.raises(DataError, match=r"leaves out what the assistant thinks in message 1 \(assistant\)"):
        encode(byte_tokenizer(shipped_template("deepseek_r1_distill")), dialogue("Hi", "<think>greet</think>Hello."))


def test_line_feeds_that_join_at_the_border_leave_the_answer_scored():
    """An empty thought after ``<think>`` and a line feed: its two line feeds are one token of Qwen."""
    for name in ("qwen3_5_think", "qwen3", "qwen3_5_nothink"):
        tokenizer = byte_tokenizer(shipped_template(name), merges=(("Ċ", "Ċ"),))
        (row,) = encode(tokenizer, dialogue("Hi", "Hello.", "Go", "Bye."))
        assert [text.split("</think>")[-1].strip() for text in scored_texts(tokenizer, row)] == [
            "Hello.<|im_end|>",
            "Bye.<|im_end|>",
        ]
    tokenizer = byte_tokenizer(shipped_template("qwen2_5"), merges=(("Ċ", "Ċ"),))
    (row,) = encode(tokenizer, dialogue("Hi", "\nHello."))  # the line feed joins that of the header
    assert scored_texts(tokenizer, row) == ["Hello.<|im_end|>"]


def test_a_tokenizer_that_joins_the_prompt_to_the_answer_is_refused():
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}"
    tokenizer = byte_tokenizer(template + "assistant:{% endif %}", merges=((":", "H"),))
    with pytest.raises(DataError, match=r"example 0: the tokenizer joins the end of the prompt .*assistant:.*'Hello"):
        encode(tokenizer, dialogue("Hi", "Hello."))


# --------------------------------------------------------------------------------------------------------- the clock


def fingerprint_on(monkeypatch, day, template):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):  # noqa: ARG003
            return datetime(2031, 5, day)  # noqa: DTZ001

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return encode(byte_tokenizer(template, bos="<b>"), dialogue("Hi", "Hello.")).fingerprint


@pytest.mark.parametrize("template", [LLAMA3, shipped_template("llama3_2"), shipped_template("gptoss")])
def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(monkeypatch, template):
    first, second = (fingerprint_on(monkeypatch, day, template) for day in (1, 2))
    assert first == second
    (row,) = encode(tokenizer := byte_tokenizer(template, bos="<b>"), dialogue("Hi", "Hello."))
    assert re.search(r"26 Jul 2024|2024-07-26", tokenizer.decode(row.input_ids))


def test_the_log_names_the_date_the_doubled_bos_and_the_missing_markers_once(caplog):
    caplog.set_level(logging.INFO)
    tokenizer = byte_tokenizer(LLAMA3 + "{# once #}", bos="<b>")
    for _ in range(2):
        encode(tokenizer, dialogue("Hi", "Hello."))
    for words in (
        "writes today's date; geomkit writes 26 July 2024",
        "the token <b> twice",
        "no {% generation %} markers",
    ):
        assert sum(words in text for text in caplog.messages) == 1
    assert any("the end of its turn, '<|eot_id|>'" in text for text in caplog.messages)
    caplog.clear()
    encode(tiny_tokenizer(), dialogue("help", "sure"))
    assert not caplog.messages


def test_a_date_in_a_computed_format_is_refused():
    template = "{% set f = '%d' %}{{ strftime_now(f) }}" + HEADERLESS
    with pytest.raises(DataError, match="expected a chat template whose output does not depend on the clock"):
        encode(byte_tokenizer(template), dialogue("Hi", "Hello."))


# ----------------------------------------------------------------------------------------------- nothing is left out


def test_a_message_that_the_template_does_not_write_is_refused():
    template = "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    tokenizer = byte_tokenizer(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    encode(tokenizer, dialogue("Hi", "Hello."))
    for examples in (dialogue("Hi", "Hello.", system="Be terse."),):
        with pytest.raises(DataError, match=r"example 0: the chat template does not write message 0 \(system\)"):
            encode(tokenizer, examples)
        with pytest.raises(DataError, match=r"prompt 0: the chat template does not write message 0 \(system\)"):
            encode_prompts(tokenizer, [examples[0]["messages"][:2]])


def test_lists_of_parts_reach_a_template_that_reads_nothing_else():
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    (row,) = encode(tokenizer, dialogue("Hi", "Hello."))
    assert tokenizer.decode(row.input_ids) == "<|user|>Hi</s><|assistant|>Hello.</s>"
    assert scored_texts(tokenizer, row) == ["Hello.</s>"]


def test_threads_that_render_at_the_same_time_get_the_spans_of_their_own_conversation():
    """Transformers tracks the markers in one object for all threads."""
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer)
    row = conversation(dialogue(*["help", "sure"] * 6)[0]["messages"])
    expected, wrong = template.render_marked(row), []

    def render():
        wrong.extend(found for _ in range(100) if (found := template.render_marked(row)) != expected)

    threads = [threading.Thread(target=render) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
