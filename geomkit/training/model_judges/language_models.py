"""Answers to a judge's questions by a causal language model, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.inputs.messages import Message
from geomkit.training.model_judges.rubrics import Question
from geomkit.training.responses import end_of_turn_text, generate_from_tokens, response_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """Greedy answers of a causal language model, on the device where the model is.

    Attributes:
        model: A causal language model; its state is restored.
        tokenizer: Its tokenizer, with a chat template unless the questions are raw text. Without a pad token, the
            end-of-sequence token fills short rows, to which the model does not attend.
        batch_size: Questions answered at a time.
        progress: Show a bar.
    """

    model: "PreTrainedModel" = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    batch_size: int = 8
    progress: bool = True

    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Return the answers to questions, each of at most ``max_new_tokens`` tokens.

        Raises:
            DataError: If a question is a conversation and the tokenizer has no chat template, or the template leaves
                out the response that is judged.
        """
        # An end of turn is a word like any other in raw text.
        raw = any(isinstance(question, str) for question in questions)
        return generate_from_tokens(
            self.model,
            self.tokenizer,
            [self._encode(question) for question in questions],
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            progress=self.progress,
            title="judge",
            ends=None if raw else response_ends(self.model, self.tokenizer),
            pad=self._pad(),
            stop="" if raw else end_of_turn_text(self.tokenizer),
        )

    def _pad(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError(
            f"expected a judge with a pad or end-of-sequence token, found none on '{self.tokenizer.name_or_path}'; set "
            "the judge's tokenizer.pad_token"
        )

    def _encode(self, question: Question) -> list[int]:
        if isinstance(question, str):
            return list(self.tokenizer(question)["input_ids"])
        # The template has put in the special tokens already.
        return list(self.tokenizer(self._render(question), add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[Message]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"expected a judge with a chat template, found none on '{self.tokenizer.name_or_path}'; take another "
                "model or a rubric whose form is 'text'"
            )
        # Some templates, as Llama Guard's of 1B, read content in parts only, and drop a text without a word.
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        for content in (messages, parts):
            try:
                text = self._apply(content)
            except Exception as error:  # a template in jinja raises anything
                reason = f"{type(error).__name__}: {error}"
                continue
            if messages[-1]["content"].strip() in text:
                return text
            reason = "a text without it"
        raise DataError(
            f"expected the chat template of '{self.tokenizer.name_or_path}' to show the judge the response, found "
            f"{reason}; take a rubric whose form is 'text'"
        )

    def _apply(self, messages: Sequence[Any]) -> str:
        text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text
