"""Other ways to rank training rows by what they do to safety, each as a score that is high for suspicious rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomkit.collection.collect import collect_from_tokens
from geomkit.collection.measures import Sketch, sketch
from geomkit.collection.streaming import TOKENS_PER_BATCH, stream
from geomkit.gradients.batch_products import products_with
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix
from geomkit.inputs.batches import collate, plan_batches
from geomkit.inputs.examples import prompt_of, response_of
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.parameters import as_selection
from geomkit.inputs.tokens import EncodedExamples, lengths_of, pad_id
from geomkit.screening.screening import Screening
from geomkit.training.judges import RefusalPhrases

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Setting:
    """What a ranking may use.

    Attributes:
        model: The aligned model.
        tokenizer: Its tokenizer.
        rows: The training rows.
        safe: Forbidden requests, refused: the safety set of the screen.
        harmful: The same requests, obeyed, which rivals with two anchors need and the screen does not.
        screening: The screen with the method ``"adam"``, which has the scores of every method.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    rows: EncodedExamples
    safe: EncodedExamples
    harmful: EncodedExamples
    screening: Screening


def rankings(setting: Setting) -> dict[str, Values]:
    """Return the scores of every ranking, by its name."""
    return {name: values for ranking in RANKINGS.values() for name, values in ranking(setting).items()}


def _loss(setting: Setting) -> dict[str, Values]:
    return {"loss": setting.screening.rows.loss}


def _length(setting: Setting) -> dict[str, Values]:
    return {"length": setting.screening.rows.tokens}


def _keyword(setting: Setting) -> dict[str, Values]:
    """Return 1 for a row whose answer has no refusal of the judge by keywords, else 0."""
    judge = RefusalPhrases()
    flags = [
        not judge(prompt_of(messages)[-1]["content"], response_of(messages))
        for messages in setting.rows.examples["messages"]
    ]
    return {"no refusal keyword": np.array(flags, dtype=np.float64)}


def _words(setting: Setting) -> dict[str, Values]:
    """Return the largest tf-idf cosine of a row's request and a forbidden request."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    asked, forbidden = (
        [prompt_of(messages)[-1]["content"] for messages in rows.examples["messages"]]
        for rows in (setting.rows, setting.safe)
    )
    vectors = TfidfVectorizer().fit(asked + forbidden)
    products = vectors.transform(asked) @ vectors.transform(forbidden).T
    return {"words of the request (tf-idf)": np.asarray(products.toarray().max(1), dtype=np.float64)}


def _representations(setting: Setting) -> dict[str, Values]:
    """Return He et al.'s representation matching (2404.01099), with one and with two anchors.

    The representation is the last layer's hidden state at the last token of the answer, before the head. An anchor is
    the mean over its set.
    """
    rows, safe, harmful = (
        _normalized(_last_states(setting.model, setting.tokenizer, rows))
        for rows in (setting.rows, setting.safe, setting.harmful)
    )
    to_harmful, to_safe = (rows @ _normalized(anchor.mean(0, keepdims=True))[0] for anchor in (harmful, safe))
    return {"representation": to_harmful, "representation, two anchors": to_harmful - to_safe}


def _last_states(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: EncodedExamples
) -> NDArray[np.float64]:
    states: dict[int, Tensor] = {}
    with model_state_kept(model), torch.no_grad():
        model.eval()
        for plan in plan_batches(lengths_of(rows), TOKENS_PER_BATCH):
            batch = collate([rows[index] for index in plan], pad_id(tokenizer), examples=plan)
            hidden = model(**batch.inputs(), output_hidden_states=True, use_cache=False).hidden_states[-1]
            last = batch.attention_mask.sum(1) - 1
            states |= zip(plan, hidden[torch.arange(len(plan)), last].double(), strict=True)
    return torch.stack([states[index] for index in range(len(rows))]).numpy()


def _gradients(setting: Setting) -> dict[str, Values]:
    """Return He et al.'s gradient matching, with one and with two anchors, and a projected cosine in the way of LESS.

    He et al. take the gradient of the first ten tokens of an answer; here it is that of the whole answer. LESS
    (2402.04333) projects Adam's gradients of adapters; here plain gradients of all weights are projected, and the score
    is minus the cosine with the projected safety gradient. Neither is standardized by length.
    """
    pad = pad_id(setting.tokenizer)
    safe, harmful = (collect_from_tokens(setting.model, rows, pad) for rows in (setting.safe, setting.harmful))
    projection: Sketch = sketch(16)
    projected_safe = {name: projection(name, [gradient])[0].flatten() for name, gradient in safe.items()}
    against = {name: as_matrix(gradient) for name, gradient in harmful.items()}
    count = len(setting.rows)
    products, projected, projected_squares = (torch.zeros(count, dtype=torch.float64) for _ in range(3))

    def add_up(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        places = list(examples)
        if name in against:
            products[places] += products_with(gradients, against[name])
            small = projection(name, gradients).flatten(1)
            projected[places] += (small @ projected_safe[name]).double()
            projected_squares[places] += small.square().sum(1).double()

    stream(setting.model, setting.rows, pad, as_selection("*"), samples=add_up)
    to_harmful = products.numpy() / setting.screening.rows.norm / harmful.norm
    small_norm = sum(float(part.double().square().sum()) for part in projected_safe.values()) ** 0.5
    return {
        "gradient of obeyed requests": to_harmful,
        "gradients, two anchors (He et al.)": to_harmful + setting.screening.rows.cosine,
        "projected cosine (LESS)": (-projected / projected_squares.sqrt()).numpy() / small_norm,
    }


def _screen(setting: Setting) -> dict[str, Values]:
    """Return the scores of the screen: standardized by length, and as they are."""
    from dataclasses import replace

    by_method = {method: replace(setting.screening, method=method) for method in ("cosine", "raw", "adam")}
    standardized = {f"screen, {method}": screening.scores for method, screening in by_method.items()}
    plain = {f"{method}, not standardized": getattr(setting.screening.rows, method) for method in by_method}
    return {**standardized, **plain, "share in the safety subspace": setting.screening.rows.share}


def _normalized(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


RANKINGS: Mapping[str, Callable[[Setting], dict[str, Values]]] = MappingProxyType(
    {
        "screen": _screen, "loss": _loss, "length": _length, "keyword": _keyword, "words": _words,
        "representations": _representations, "gradients": _gradients,
    }
)  # fmt: skip
"""The rankings; each function returns the scores of one or several."""
