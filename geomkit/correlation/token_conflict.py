"""Contribution of every token of the utility examples to the conflict with the mean safety gradient.

An example's gradient is the mean of its tokens' gradients, so the example's inner product with the mean safety gradient
is a sum over tokens: ⟨g, ḡ_s⟩ = Σ_t ⟨∇ℓ_t, ḡ_s⟩ / T. Each term is the derivative of one token's loss along ḡ_s, which
one forward-mode pass gives exactly for all tokens at once; no gradient of a single token is formed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from geomkit.collection.streaming import TOKENS_PER_BATCH
from geomkit.correlation.token_derivatives import TokenValues, token_derivatives
from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_gradients
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.tokens import EncodedExamples, Tokens
from geomkit.stats.jackknife import jackknife_interval, leave_one_out_means
from geomkit.utils.arguments import check_confidence
from geomkit.utils.display import Html, element, joined
from geomkit.utils.figures import DrawnResult, draw
from geomkit.utils.saving import saveable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MIN_EXAMPLES = 2
_SHOWN = 5  # examples in a notebook


@saveable
@dataclass(frozen=True, eq=False)
class ExampleTokens:
    """Contribution of each of the T tokens of one example to the conflict.

    Attributes:
        ids: Token ids, length T.
        tokens: Token texts, length T.
        scored: (T,) whether the token belongs to the assistant, so that the loss includes it.
        losses: (T,) loss of each token in nats; NaN where not scored.
        contributions: (T,) contribution of each token to the derivative of the example's loss along the unit safety
            gradient; NaN where not scored. See :class:`TokenConflict` for the sign.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    scored: np.ndarray
    losses: np.ndarray
    contributions: np.ndarray

    @property
    def total(self) -> float:
        """⟨g, ḡ_s⟩ / ‖ḡ_s‖ for the example's gradient g, the sum of the contributions of its tokens."""
        return float(self.contributions[self.scored].sum())


@dataclass(frozen=True, eq=False)
class TokenConflict(DrawnResult):
    """Contributions of single tokens to the conflict, in nats per unit length along the safety gradient.

    To first order, learning a token with a *positive* contribution also lowers the safety loss, and learning a token
    with a *negative* contribution raises the safety loss, which is the conflict: a step of gradient descent of size η
    on an example changes the safety loss by −η · ‖ḡ_s‖ times the example's total.

    Attributes:
        examples: The examples in the order given, with the contributions of their tokens.
        norm: ‖ḡ_s‖ over the parameters of the safety gradient; contributions times ``norm`` are inner products with
            ḡ_s.
        confidence: Nominal coverage of the intervals.
    """

    examples: tuple[ExampleTokens, ...] = field(repr=False)
    norm: float
    confidence: float = 0.95

    @property
    def totals(self) -> np.ndarray:
        """(N,) derivative of each example's loss along the unit safety gradient, in nats per unit length."""
        return np.array([example.total for example in self.examples])

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of the mean of ``totals``, over utility examples, given the safety gradient."""
        low, high = _interval(self.totals[:, None], self.confidence)
        return float(low[0]), float(high[0])

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per scored token.

        The columns are ``example``, ``position``, ``token``, ``id``, ``loss`` and ``contribution``.
        """
        import pandas as pd

        rows = [
            (
                number,
                position,
                example.tokens[position],
                example.ids[position],
                example.losses[position],
                example.contributions[position],
            )
            for number, example in enumerate(self.examples)
            for position in np.flatnonzero(example.scored).tolist()
        ]
        return pd.DataFrame(rows, columns=["example", "position", "token", "id", "loss", "contribution"])

    def by_token(self) -> "pd.DataFrame":
        """Return a data frame with one row per distinct token, the most conflicting token first.

        The columns are ``token`` and ``id``; ``count``, the number of scored positions of the token, and ``examples``,
        the number of examples with such a position; ``loss`` and ``contribution``, means over these positions; and
        ``total`` with ``low`` and ``high``: the token's contribution to the mean over examples, with Student's
        interval over examples. The totals of all tokens sum to the mean of :attr:`totals`. Intervals of tokens in a
        handful of examples are rough.
        """
        frame = self.to_frame()
        grouped = frame.groupby("id", sort=True)
        table = grouped.agg(
            token=("token", "first"),
            count=("loss", "size"),
            examples=("example", "nunique"),
            loss=("loss", "mean"),
            contribution=("contribution", "mean"),
        ).reset_index()
        # Contribution of every distinct token to every example, (N, tokens); zero where the example lacks the token.
        sums = frame.pivot_table(index="example", columns="id", values="contribution", aggfunc="sum", fill_value=0.0)
        by_example = sums.reindex(range(len(self.examples)), fill_value=0.0).to_numpy()
        low, high = _interval(by_example, self.confidence)
        table = table.assign(total=by_example.mean(0), low=low, high=high)
        first = ["token", "id", "count", "examples"]
        return table[[*first, *table.columns.difference(first, sort=False)]].sort_values("total", ignore_index=True)

    def plot(self) -> "go.Figure":
        """Draw the most conflicting tokens, see :func:`geomkit.plots.tokens.plot_token_conflict`."""
        return draw("plot_token_conflict", self)

    def __str__(self) -> str:
        """Return the mean over examples, the share of conflicting tokens, and the most conflicting tokens."""
        frame, (low, high) = self.to_frame(), self.interval
        worst = self.by_token().head(3)
        named = ", ".join(
            f"{token!r} {total:+.2g}" for token, total in zip(worst["token"], worst["total"], strict=True)
        )
        against = (frame["contribution"] < 0).mean()
        return (
            f"derivative of the utility loss along the safety gradient {self.totals.mean():+.3g} "
            f"[{low:+.3g}, {high:+.3g}] nats per unit; {against:.1%} of {len(frame)} tokens against safety, the worst "
            f"{named}"
        )

    def _repr_html_(self) -> str:
        return tinted(str(self), sorted(self.examples, key=lambda example: example.total)[:_SHOWN])


def token_conflict(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    utility: "Dataset | EncodedExamples",
    safety_gradients: Mapping[str, LayerGradient],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    confidence: float = 0.95,
    progress: bool = True,
) -> TokenConflict:
    """Return the contribution of every token of the utility examples to the conflict with the safety gradient.

    The cost is about three forward passes over the examples and the memory of a dense copy of the safety gradient; no
    autograd graph is kept. For a control, pass the gradient of benign prompts with the same refusals in place of the
    safety gradient: tokens that conflict with both gradients conflict with the wording of the refusals.

    Args:
        model: A causal language model, which runs in eval mode; its state is restored. Weights of fewer bits than fp32
            make the derivatives as coarse as the weights.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        utility: Rows with a column ``messages``, at least two.
        safety_gradients: The mean safety gradient by parameter, such as a
            :class:`~geomkit.gradients.gradient_set.GradientSet` of the same model. Other parameters do not count.
        tokens_per_batch: Largest number of token positions in a batch, padding included.
        confidence: Nominal coverage of the intervals, between 0 and 1.
        progress: Show a progress bar, in tokens.

    Returns:
        The contribution of every scored token.

    Raises:
        DataError: If the examples cannot be encoded.
        GeometryError: If there are fewer than two examples, ``safety_gradients`` holds something other than gradients,
            or the confidence is not between 0 and 1.
        CollectionError: If the gradient does not fit the model, an operation of the model has no forward-mode
            derivative, or a value is not finite.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> utility = gk.load_examples("scenarios/new-skill").select(range(4))
        >>> safety = gk.load_examples("safety").select(range(4))
        >>> gradients = gk.collect_gradients(model, tokenizer, safety, progress=False)
        >>> tokens = token_conflict(model, tokenizer, utility, gradients, progress=False)
        >>> list(tokens.by_token().columns)
        ['token', 'id', 'count', 'examples', 'loss', 'contribution', 'total', 'low', 'high']
    """
    check_gradients("safety", safety_gradients)
    check_confidence(confidence)
    rows, pad = encoded_for(model, tokenizer, utility, progress)
    if len(rows) < _MIN_EXAMPLES:
        raise GeometryError(
            f"expected at least {_MIN_EXAMPLES} utility examples to tell their spread, found {len(rows)}; give more"
        )
    # Loss ℓ_t of every token and its derivative ⟨∇ℓ_t, ḡ_s⟩ / ‖ḡ_s‖.
    values, norm = token_derivatives(
        model, rows, pad, safety_gradients, tokens_per_batch=tokens_per_batch, progress=progress
    )
    examples = example_tokens(tokenizer, rows, values)
    return TokenConflict(examples, norm, confidence)


def example_tokens(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Tokens], values: Sequence[TokenValues]
) -> tuple[ExampleTokens, ...]:
    """Return the tokens of examples with their contributions.

    Args:
        tokenizer: The model's tokenizer.
        rows: The examples.
        values: Losses and derivatives of every example's tokens, from
            :func:`~geomkit.correlation.token_derivatives.token_derivatives`.
    """
    texts = {token: _text(tokenizer, token) for row in rows for token in row.input_ids}
    # Contributions: the derivatives divided by the number of scored tokens, over which the example's loss averages.
    examples = []
    for row, (losses, derivatives) in zip(rows, values, strict=True):
        scored = np.array((False, *row.loss_mask[1:]))
        examples.append(
            ExampleTokens(
                row.input_ids,
                tuple(texts[token] for token in row.input_ids),
                scored,
                np.where(scored, losses.numpy(), np.nan),
                np.where(scored, derivatives.numpy() / row.loss_tokens, np.nan),
            )
        )
    return tuple(examples)


def _text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Return a token's text with the space before a word, which SentencePiece drops where the word stands alone."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def _interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of Student's interval of the mean over the first axis."""
    return jackknife_interval(values.mean(0), leave_one_out_means(values), confidence=confidence)


_AGAINST = "178,24,43"
_WITH = "33,102,172"
_DARKEST = 0.95
"""Quantile of the contributions' magnitudes from which on the tint is the darkest."""


def tinted(heading: str, examples: "Sequence[ExampleTokens]") -> Html:
    """Render examples as HTML, tokens against safety in red, tokens with safety in blue, unscored tokens in grey."""
    sizes = np.concatenate([np.abs(example.contributions[example.scored]) for example in examples])
    scale = float(np.quantile(sizes, _DARKEST)) or 1.0
    legend = joined(
        _span("against safety", _AGAINST, 0.6), " ", _span("with safety", _WITH, 0.6),
        " one example per paragraph, the most conflicting first",
    )  # fmt: skip
    paragraphs = (_paragraph(example, scale) for example in examples)
    return element("div", element("p", element("b", heading)), element("p", legend), *paragraphs)


def _paragraph(example: "ExampleTokens", scale: float) -> Html:
    tokens = (
        _token(text, float(value), scale) if scored else element("span", text, style="color:#767676")
        for text, value, scored in zip(example.tokens, example.contributions, example.scored, strict=True)
    )
    return element("p", element("b", f"{example.total:+.3g}"), " ", *tokens, style="white-space:pre-wrap")


def _token(text: str, value: float, scale: float) -> Html:
    colour = _AGAINST if value < 0 else _WITH
    return _span(text, colour, 0.75 * min(abs(value) / scale, 1.0), f"{value:+.3g}")


def _span(text: str, colour: str, opacity: float, hover: str = "") -> Html:
    return element("span", text, title=hover, style=f"background:rgba({colour},{opacity:.2f})")
