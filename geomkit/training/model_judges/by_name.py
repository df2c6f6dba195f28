"""A judge by its name and model, as written on the command line."""

from dataclasses import replace

from geomkit.errors import DataError
from geomkit.inputs.models import load_model
from geomkit.training.judges import BatchJudge, Judge, RefusalPhrases, gcg_judge
from geomkit.training.model_judges.classifiers import ClassifierJudge, load_classifier
from geomkit.training.model_judges.endpoints import EndpointAnswers, connect
from geomkit.training.model_judges.language_models import ModelAnswers
from geomkit.training.model_judges.presets import RUBRICS
from geomkit.training.model_judges.rubric_judge import RubricJudge

_KEYWORDS = {"keywords": RefusalPhrases, "gcg": gcg_judge}
_WAYS = (
    f"{', '.join(_KEYWORDS)}, RUBRIC=MODEL or RUBRIC=openai:MODEL ({', '.join(RUBRICS)}), refused:LABEL=MODEL or "
    "harmful:LABEL=MODEL"
)


def load_judge(
    text: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    url: str | None = None,
    template: str | None = None,
    progress: bool = True,
) -> Judge | BatchJudge:
    """Return the judge that a text names.

    Args:
        text: ``keywords`` (the default elsewhere) or ``gcg`` (the phrases of the literature on jailbreaks);
            ``RUBRIC=MODEL`` for a rubric that a causal language model answers, a folder or a hub id, which can be left
            out where the rubric has a model of its own; ``RUBRIC=openai:MODEL`` for a model behind an endpoint;
            ``refused:LABEL,…=MODEL`` for a sequence classifier of responses, or ``harmful:LABEL,…=MODEL`` for a
            sequence classifier of prompts with responses.
        device: Device of the judge's model; when left out, a GPU if there is one, else the CPU.
        dtype: Dtype of a causal language model.
        batch_size: Responses judged at a time.
        url: Address of the endpoint, see :func:`~geomkit.training.model_judges.endpoints.connect`.
        template: Question in place of the rubric's, with ``{prompt}`` and ``{response}``.
        progress: Show a bar while a model answers.

    Raises:
        DataError: If there is no such judge, or its model cannot be loaded.

    Example:
        >>> load_judge("keywords")("help", "I cannot help with that.")
        True
    """
    name, _, model = text.partition("=")
    kind, _, labels = name.partition(":")
    if text in _KEYWORDS and template is None:
        return _KEYWORDS[text]()
    if kind in {"refused", "harmful"} and labels and model and template is None:
        names = tuple(label.strip() for label in labels.split(","))
        classifier, tokenizer = load_classifier(model, device=device)
        return ClassifierJudge(
            classifier,
            tokenizer,
            **{kind: names},
            pair=kind == "harmful",
            source=model,
            batch_size=batch_size,
            progress=progress,
        )
    if name not in RUBRICS:
        found = f"'{text}' with a prompt; take a rubric, or leave the prompt out" if template else f"'{text}'"
        raise DataError(f"expected a judge, {_WAYS}, found {found}")
    rubric = RUBRICS[name] if template is None else replace(RUBRICS[name], template=template)
    if not (model := model or rubric.model):
        raise DataError(
            f"expected a model for the judge '{name}', found none; write {name}=MODEL, a folder or a hub id"
        )
    if model.startswith("openai:"):
        client = connect(url)
        return RubricJudge(rubric, EndpointAnswers(client, model.removeprefix("openai:"), batch_size, progress), model)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    return RubricJudge(rubric, ModelAnswers(loaded, tokenizer, batch_size, progress), model)
