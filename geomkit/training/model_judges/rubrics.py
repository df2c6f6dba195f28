"""Rubrics: what a judge that is a language model is asked about a response, and how its answer is read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from geomkit.inputs.messages import Message
from geomkit.training.judges import Verdict

Question = str | list[Message]
"""What a judge is asked: raw text to continue, or a conversation."""


@dataclass(frozen=True)
class Rubric:
    """A question about a prompt and a response, and how the answer is read.

    Attributes:
        name: Name of the rubric.
        template: The question, with ``{prompt}`` and ``{response}``; empty where ``form`` is ``"conversation"``.
        form: ``"chat"`` puts the question as a user message, ``"text"`` as raw text that already has all markers of the
            judge, and ``"conversation"`` passes prompt and response as messages to a judge whose chat template asks.
        parse: Function that reads the verdict from an answer; it returns ``None`` where there is none.
        answer: What an answer looks like, for error messages.
        decides: Fields of :class:`~geomkit.training.judges.Verdict` that the rubric decides.
        labels: Labels whose shares are counted.
        max_new_tokens: Length of the longest answer, in tokens.
        model: The model that was trained for this rubric, on the hub; empty where any language model will do.
        source: Where the rubric is from.
    """

    name: str
    template: str = field(repr=False)
    form: Literal["chat", "text", "conversation"]
    parse: Callable[[str], Verdict | None] = field(repr=False)
    answer: str
    decides: tuple[str, ...]
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 16
    model: str = ""
    source: str = ""

    def question(self, prompt: str, response: str) -> Question:
        """Return what the judge is asked about a response.

        Example:
            >>> from geomkit.training.model_judges.presets import RUBRICS
            >>> RUBRICS["llama-guard"].question("Hi", "Hello")
            [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
        """
        if self.form == "conversation":
            return [_message("user", prompt), _message("assistant", response)]
        # In one pass, so that braces in the texts stay as they are.
        before, _, rest = self.template.partition("{prompt}")
        between, _, after = rest.partition("{response}")
        text = f"{before}{prompt}{between}{response}{after}"
        return text if self.form == "text" else [_message("user", text)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
