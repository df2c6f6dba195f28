"""Answers to a judge's questions by an endpoint that speaks OpenAI's protocol, such as a server of vLLM."""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.training.model_judges.rubrics import Question
from geomkit.utils.progress import with_bar

if TYPE_CHECKING:
    from openai import OpenAI

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EndpointAnswers:
    """Answers of a model behind an endpoint, at temperature 0, asked for by several threads.

    Attributes:
        client: Client of the endpoint, see :func:`connect`.
        model: Name of the model there.
        threads: Questions asked at a time.
        progress: Show a bar, if it takes longer than five seconds.
    """

    client: "OpenAI" = field(repr=False)
    model: str
    threads: int = 8
    progress: bool = True

    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Return the answers to questions, each of at most ``max_new_tokens`` tokens.

        Raises:
            DataError: If the endpoint cannot be reached, refuses a question, or answers without text.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(self._ask, question, max_new_tokens) for question in questions]
            try:
                return [future.result() for future in with_bar(futures, "judge", "answer", self.progress)]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, no more questions are paid for

    def _ask(self, question: Question, max_new_tokens: int) -> str:
        from openai import BadRequestError, OpenAIError

        settings: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": max_new_tokens}
        try:
            try:
                answer = self._create(question, settings)
            except BadRequestError as error:
                answer = self._create(question, _without_refused(settings, str(error)))
        except OpenAIError as error:
            raise DataError(
                f"expected an answer of '{self.model}' at {self.client.base_url}, found {type(error).__name__}: "
                f"{' '.join(str(error).split()):.200}; check the address, the key and the model's name"
            ) from None
        except (AttributeError, IndexError, TypeError):  # a server that speaks another protocol
            answer = None
        if answer is None:
            raise DataError(
                f"expected text from '{self.model}' at {self.client.base_url}, found no message with text; give an "
                "address that speaks OpenAI's protocol, or another model"
            )
        return str(answer)

    def _create(self, question: Question, settings: Mapping[str, Any]) -> str | None:
        if isinstance(question, str):
            text: str | None = self.client.completions.create(prompt=question, **settings).choices[0].text
            return text
        create: Any = self.client.chat.completions.create
        content: str | None = create(messages=question, **settings).choices[0].message.content
        return content


def _without_refused(settings: Mapping[str, Any], message: str) -> dict[str, Any]:
    """Return the settings without those that a model refuses, as OpenAI's models that reason do.

    Args:
        settings: The settings of a question.
        message: What the endpoint said; it names the settings that it wants, or does not.
    """
    if "max_completion_tokens" not in message and "temperature" not in message:
        return dict(settings)
    _LOG.warning("judge '%s': asked without temperature 0, which the endpoint refuses", settings["model"])
    return {"model": settings["model"], "max_completion_tokens": settings["max_tokens"]}


def connect(url: str | None = None, *, key: str | None = None, timeout: float = 120, retries: int = 4) -> "OpenAI":
    """Return a client of an endpoint that speaks OpenAI's protocol.

    Args:
        url: Address of the endpoint, such as ``http://localhost:8000/v1``; OpenAI's, or that of the environment
            variable ``OPENAI_BASE_URL``, when left out.
        key: Key; that of the environment variable ``OPENAI_API_KEY`` when left out. Servers of one's own need none.
        timeout: Seconds until a question is given up.
        retries: Times a question is asked again after a failure of the network or a full server.

    Raises:
        DataError: If the package ``openai`` is missing, or there is no key for OpenAI's endpoint.
    """
    try:
        from openai import OpenAI, OpenAIError
    except ImportError:
        raise DataError(
            "expected the package openai for a judge behind an endpoint, found none; pip install 'geomkit[openai]'"
        ) from None
    own = url or os.environ.get("OPENAI_BASE_URL")
    key = key or os.environ.get("OPENAI_API_KEY") or ("none" if own else None)
    try:
        return OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
    except OpenAIError as error:
        raise DataError(
            "expected a key for OpenAI's endpoint in OPENAI_API_KEY, found none; set it, or give another "
            f"endpoint's address ({type(error).__name__})"
        ) from None
