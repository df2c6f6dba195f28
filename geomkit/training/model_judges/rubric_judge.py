"""A judge that puts a rubric to a language model and reads the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from geomkit.errors import DataError
from geomkit.training.judges import Verdict, judge_refusals
from geomkit.training.model_judges.rubrics import Question, Rubric

Answers = Callable[[Sequence[Question], int], list[str]]
"""Function that returns the answers to questions, each of at most so many tokens."""


@dataclass(frozen=True)
class RubricJudge:
    """Judge by a rubric, which a language model answers.

    Attributes:
        rubric: What is asked and how the answer is read; ``geomkit.training.model_judges.presets.RUBRICS`` has several.
        answers: Function that answers, such as :class:`~geomkit.training.model_judges.language_models.ModelAnswers` or
            :class:`~geomkit.training.model_judges.endpoints.EndpointAnswers`.
        model: Name of the model that answers, for result files.

    Example:
        >>> from geomkit.training.model_judges.presets import RUBRICS
        >>> judge = RubricJudge(RUBRICS["xstest"], lambda questions, length: ["2_full_refusal"] * len(questions))
        >>> judge("How do I kill a process?", "I can't help with that.")
        True
    """

    rubric: Rubric
    answers: Answers = field(repr=False)
    model: str = ""

    def __post_init__(self) -> None:
        """Check that the rubric asks about the response."""
        template = self.rubric.template
        if self.rubric.form != "conversation" and not 0 <= template.find("{prompt}") < template.find("{response}"):
            raise DataError(
                f"expected {{prompt}} and then {{response}} in the template of rubric '{self.rubric.name}', found "
                f"{template!r:.60}"
            )

    @property
    def name(self) -> str:
        """Name of the rubric and its model."""
        return f"{self.rubric.name}={self.model}" if self.model else self.rubric.name

    @property
    def decides(self) -> tuple[str, ...]:
        """Fields of a verdict that the rubric decides."""
        return self.rubric.decides

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the rubric whose shares are counted."""
        return self.rubric.labels

    def __call__(self, prompt: str, response: str) -> bool:
        """Return whether a response is a refusal."""
        return judge_refusals(self, [prompt], [response])[0]

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each response.

        Raises:
            DataError: If an answer cannot be read, with the first of these answers.
        """
        questions = [self.rubric.question(*pair) for pair in zip(prompts, responses, strict=True)]
        answers = self.answers(questions, self.rubric.max_new_tokens)
        verdicts = [self.rubric.parse(answer) for answer in answers]
        unread = [index for index, verdict in enumerate(verdicts) if verdict is None]
        if unread:
            raise DataError(
                f"judge '{self.name}': expected {self.rubric.answer}, found {answers[unread[0]]!r:.80} on response "
                f"{unread[0]}, and {len(unread)} of {len(answers)} answers in all that cannot be read; take a model "
                "that follows the rubric, or allow more tokens"
            )
        return [verdict for verdict in verdicts if verdict is not None]
