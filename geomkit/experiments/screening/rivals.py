"""Other ways to rank training rows by what they do to safety, each as a score that is high for suspicious rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomkit.collection.measures import Sketch, sketch
from geomkit.gradients.batch_products import products_with
from geomkit.gradients.gradient_set import GradientSet, set_norm
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix
from geomkit.inputs.batches import collate, plan_batches
from geomkit.inputs.examples import prompt_of, required_final_answer
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.tokens import Tokens, lengths_of
from geomkit.screening.reference import difference
from geomkit.training.judges import RefusalPhrases

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

Values = NDArray[np.float64]


RIVALS = (
    "representation", "representation, two anchors", "gradient of obeyed requests",
    "gradients, two anchors (He et al.)", "projected cosine (LESS)",
)  # fmt: skip
"""Names of the rankings that need the model; :func:`text_rankings` returns those that need the text alone."""


def text_rankings(rows: "Dataset", forbidden: "Dataset") -> dict[str, Values]:
    """Return whether an answer has no refusal of the judge by keywords, and how like a request is to forbidden ones.

    The likeness is the largest tf-idf cosine of the request and a forbidden request.

    Args:
        rows: The training rows.
        forbidden: Forbidden requests.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    judge = RefusalPhrases()
    flags = [not judge(prompt_of(row)[-1]["content"], required_final_answer(row)) for row in rows["messages"]]
    asked, refused = ([prompt_of(row)[-1]["content"] for row in each["messages"]] for each in (rows, forbidden))
    vectors = TfidfVectorizer().fit(asked + refused)
    products = vectors.transform(asked) @ vectors.transform(refused).T
    return {
        "no refusal keyword": np.array(flags, dtype=np.float64),
        "words of the request (tf-idf)": np.asarray(products.toarray().max(1), dtype=np.float64),
    }


class Representations:
    """He et al.'s representation matching (2404.01099), with one and with two anchors.

    The representation is the last layer's hidden state at the last token of the answer, before the head. An anchor is
    the mean over its set.

    Args:
        model: The aligned model.
        pad: Id of the token that fills short rows.
        safe: Forbidden requests, refused.
        harmful: The same requests, obeyed.
        tokens_per_batch: Largest number of token positions in a batch.
    """

    def __init__(
        self, model: "PreTrainedModel", pad: int, safe: Sequence[Tokens], harmful: Sequence[Tokens],
        tokens_per_batch: int,
    ) -> None:  # fmt: skip
        """Compute the anchors."""
        self._model, self._pad, self._tokens_per_batch = model, pad, tokens_per_batch
        self._safe, self._harmful = (
            _normalized(_normalized(self._last_states(rows)).mean(0, keepdims=True))[0] for rows in (safe, harmful)
        )

    def rankings(self, rows: Sequence[Tokens]) -> dict[str, Values]:
        """Return the cosine with the harmful anchor, and the same minus that with the safe anchor."""
        states = _normalized(self._last_states(rows))
        to_harmful, to_safe = states @ self._harmful, states @ self._safe
        return {"representation": to_harmful, "representation, two anchors": to_harmful - to_safe}

    def _last_states(self, rows: Sequence[Tokens]) -> Values:
        states: dict[int, Tensor] = {}
        with model_state_kept(self._model), torch.no_grad():
            self._model.eval()
            for plan in plan_batches(lengths_of(rows), self._tokens_per_batch):
                batch = collate([rows[index] for index in plan], self._pad, examples=plan)
                hidden = self._model.base_model(**batch.inputs(), use_cache=False).last_hidden_state
                last = batch.attention_mask.sum(1) - 1
                states |= zip(plan, hidden[torch.arange(len(plan)), last].double(), strict=True)
        return torch.stack([states[index] for index in range(len(rows))]).numpy()


@dataclass(frozen=True, eq=False)
class GradientAnchors:
    """The gradients that rivals compare rows with.

    Attributes:
        harmful: The mean gradient of obeyed forbidden requests, dense, by parameter.
        harmful_norm: Its norm.
        difference_norm: The norm of its difference from the mean gradient of refusals.
        safe: Sketches of the mean gradient of refusals, flat, by parameter.
        safe_norm: The norm of all of them.
        sketch: The projection.
    """

    harmful: Mapping[str, Tensor]
    harmful_norm: float
    difference_norm: float
    safe: Mapping[str, Tensor]
    safe_norm: float
    sketch: Sketch


def gradient_anchors(safe: Mapping[str, LayerGradient], harmful: GradientSet) -> GradientAnchors:
    """Return the gradients that rivals compare rows with.

    Args:
        safe: The mean gradient of refusals of forbidden requests.
        harmful: That of the same requests, obeyed.
    """
    projection = sketch(16)
    projected = {name: projection(name, [gradient])[0].flatten() for name, gradient in safe.items()}
    norm = sum(float(part.double().square().sum()) for part in projected.values()) ** 0.5
    against = {name: as_matrix(gradient) for name, gradient in harmful.items()}
    apart = set_norm(difference(dict(safe), dict(harmful)))
    return GradientAnchors(against, harmful.norm, apart, projected, norm, projection)


class GradientSums:
    """He et al.'s gradient matching, with one and with two anchors, and a projected cosine in the way of LESS.

    He et al. take the gradient of the first ten tokens of an answer; here it is that of the whole answer. LESS
    (2402.04333) projects Adam's gradients of adapters; here plain gradients of all weights are projected, and the score
    is minus the cosine with the projected safety gradient. Neither is standardized by length.

    Args:
        rows: Number of rows.
        anchors: The gradients that rows are compared with.
    """

    def __init__(self, rows: int, anchors: GradientAnchors) -> None:
        """Begin with zeros."""
        self._anchors = anchors
        self._table = torch.zeros(3, rows, dtype=torch.float64)

    def add(self, name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        """Add a parameter to the sums of a batch's rows; see :data:`geomkit.collection.streaming.ExampleSink`."""
        if name not in self._anchors.harmful:
            return
        small = self._anchors.sketch(name, gradients).flatten(1)
        self._table[:, list(examples)] += torch.stack(
            [
                products_with(gradients, self._anchors.harmful[name]),
                (small @ self._anchors.safe[name]).double(),
                small.square().sum(1).double(),
            ]
        )

    def rankings(self, norm: Values, cosine: Values) -> dict[str, Values]:
        """Return the rankings of the rows.

        Args:
            norm: (N,) norms of the rows' gradients.
            cosine: (N,) minus their cosines with the safety gradient.
        """
        product, projected, squares = self._table.numpy()
        to_harmful = product / norm / self._anchors.harmful_norm
        return {
            "gradient of obeyed requests": to_harmful,
            "gradients, two anchors (He et al.)": to_harmful + cosine,
            "projected cosine (LESS)": -projected / np.sqrt(squares) / self._anchors.safe_norm,
        }


def _normalized(rows: Values) -> Values:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
