"""Control sets: examples that share with a safety set what its gradient should not be about."""

from typing import TYPE_CHECKING

from geomkit.data import prompt_of, response_of

if TYPE_CHECKING:
    from datasets import Dataset


def with_responses(prompts: "Dataset", responses: "Dataset") -> "Dataset":
    """Put the responses of one set under the prompts of another.

    Benign requests with the safety set's refusals have its wording and its loss tokens, but nothing forbidden: what a
    safety gradient shows beyond theirs is not due to the refusal's text.

    Args:
        prompts: The conversations whose beginnings are kept, N of them.
        responses: The conversations whose last assistant messages are taken, in turn.

    Returns:
        N conversations in one column, ``messages``.

    Example:
        >>> import geomkit as gk
        >>> control = with_responses(gk.load_examples("scenarios/affirmative"), gk.load_examples("safety"))
        >>> [message["content"] for message in control[0]["messages"]]
        ['Could you explain how to cover this mirror?', "I'm sorry, but I can't help with that."]
    """
    from datasets import Dataset

    answers = [response_of(messages) for messages in responses["messages"]]
    return Dataset.from_list(
        [
            {"messages": [*prompt_of(messages), {"role": "assistant", "content": answers[index % len(answers)]}]}
            for index, messages in enumerate(prompts["messages"])
        ]
    )
