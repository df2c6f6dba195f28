"""Which tokens of the utility examples cause the conflict with safety.

An example's gradient is the mean of its tokens' gradients, so its inner product with the mean safety gradient is a sum
over tokens: ⟨g, ḡ_s⟩ = Σ_t ⟨∇ℓ_t, ḡ_s⟩ / T. Each term is the derivative of one token's loss along ḡ_s, which one
forward-mode pass gives exactly for all tokens at once; no gradient of a single token is formed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from geomkit.collection.streaming import TOKENS_PER_BATCH
from geomkit.correlation.token_derivatives import token_derivatives
from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_gradients
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.tokens import AssistantMask, encode, pad_id
from geomkit.stats.jackknife import jackknife_interval, means_without_each
from geomkit.utils.arguments import check_confidence
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FEWEST = 2
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class ExampleTokens:
    """What each token of one example adds to the conflict.

    Attributes:
        ids: Token ids, length T.
        tokens: Their texts.
        scored: (T,) whether the loss is taken on a token: those of the assistant.
        losses: (T,) nats; NaN where not scored.
        contributions: (T,) what a token adds to the derivative of the example's loss along the unit safety gradient;
            NaN where not scored. See :class:`TokenConflict` for the sign.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    scored: np.ndarray
    losses: np.ndarray
    contributions: np.ndarray

    @property
    def total(self) -> float:
        """⟨g, ḡ_s⟩ / ‖ḡ_s‖ of the example's gradient g: the sum over its tokens."""
        return float(self.contributions[self.scored].sum())


@dataclass(frozen=True, eq=False)
class TokenConflict:
    """How the conflict is divided among tokens, in nats per unit of length along the safety gradient.

    A *positive* contribution says that learning this token also lowers the safety loss, a *negative* one that learning
    it raises the safety loss: that is the conflict. To first order; a step of gradient descent of size η on the
    example changes the safety loss by −η · ‖ḡ_s‖ times the example's total.

    Attributes:
        examples: In the order given.
        norm: ‖ḡ_s‖ over the parameters it was collected for; contributions times it are inner products with ḡ_s.
        confidence: Of the intervals.
    """

    examples: tuple[ExampleTokens, ...] = field(repr=False)
    norm: float
    confidence: float = 0.95

    @property
    def totals(self) -> np.ndarray:
        """(N,) derivative of each example's loss along the unit safety gradient."""
        return np.array([example.total for example in self.examples])

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the mean of ``totals``, over utility examples, the safety gradient given."""
        low, high = _interval(self.totals[:, None], self.confidence)
        return float(low[0]), float(high[0])

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per scored token: ``example``, ``position``, ``token``, ``id``, ``loss``, ``contribution``."""
        import pandas as pd

        rows = [
            (
                number,
                position,
                one.tokens[position],
                one.ids[position],
                one.losses[position],
                one.contributions[position],
            )
            for number, one in enumerate(self.examples)
            for position in np.flatnonzero(one.scored).tolist()
        ]
        return pd.DataFrame(rows, columns=["example", "position", "token", "id", "loss", "contribution"])

    def by_token(self) -> "pd.DataFrame":
        """Return a row per distinct token, the most conflicting first.

        The columns are ``token`` and ``id``; ``count`` of its scored positions, and in how many ``examples`` they are;
        ``loss`` and ``contribution``, means over its occurrences; and ``total`` with ``low`` and ``high``: what the
        token adds to the mean over examples, with Student's interval over examples. The totals of all tokens sum to
        the mean of :attr:`totals`. Intervals of tokens in a handful of examples are rough.
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
        sums = frame.pivot_table(index="example", columns="id", values="contribution", aggfunc="sum", fill_value=0.0)
        added = sums.reindex(range(len(self.examples)), fill_value=0.0).to_numpy()
        low, high = _interval(added, self.confidence)
        table = table.assign(total=added.mean(0), low=low, high=high)
        first = ["token", "id", "count", "examples"]
        return table[[*first, *table.columns.difference(first, sort=False)]].sort_values("total", ignore_index=True)

    def plot(self) -> "go.Figure":
        """Draw the most conflicting tokens, see :func:`geomkit.plots.tokens.plot_token_conflict`."""
        return draw("plot_token_conflict", self)

    def __str__(self) -> str:
        """Say the mean over examples, how many tokens conflict, and the worst of them."""
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
    utility: "Dataset",
    safety_gradients: Mapping[str, LayerGradient],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
    confidence: float = 0.95,
    progress: bool = True,
) -> TokenConflict:
    """Find the tokens of utility examples whose learning raises the safety loss.

    It costs about three forward passes over the examples and a dense copy of the safety gradient; no graph is kept. A
    gradient of benign prompts with the same refusals in place of the safety gradient is the control: tokens that
    conflict with both conflict with the refusal's wording.

    Args:
        model: A causal language model, which runs in eval mode and is left as found. Weights below fp32 make
            derivatives as coarse as they are.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        utility: Rows with a column ``messages``, at least two.
        safety_gradients: The mean safety gradient by parameter, such as a
            :class:`~geomkit.gradients.gradient_set.GradientSet` of the same model; parameters that are not in it do
        not count.
        tokens_per_batch: Most token positions run at a time, padding included.
        assistant_mask: How assistant tokens are found, see :func:`geomkit.inputs.tokens.encode`.
        max_length: Cut longer examples to this many tokens.
        confidence: Of the intervals.
        progress: Show a bar, in tokens.

    Returns:
        The contribution of every scored token.

    Raises:
        DataError: If the examples cannot be encoded.
        GeometryError: If there are fewer than two examples, these are no gradients, or the confidence is not between 0
            and 1.
        CollectionError: If the gradient does not fit the model, an operation of the model has no forward-mode
            derivative, or a value is not finite.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> utility = gk.load_examples("scenarios/new-skill").select(range(4))
        >>> safety = gk.load_examples("safety").select(range(4))
        >>> gradients = gk.collect_gradients(model, tokenizer, safety, progress=False)
        >>> found = token_conflict(model, tokenizer, utility, gradients, progress=False)
        >>> list(found.by_token().columns)
        ['token', 'id', 'count', 'examples', 'loss', 'contribution', 'total', 'low', 'high']
    """
    check_gradients("safety", safety_gradients)
    check_confidence(confidence)
    rows = encode(tokenizer, utility, assistant_mask=assistant_mask, max_length=max_length)
    if len(rows) < _FEWEST:
        raise GeometryError(f"expected at least {_FEWEST} utility examples to tell their spread, found {len(rows)}")
    values, norm = token_derivatives(
        model, rows, pad_id(tokenizer), safety_gradients, tokens_per_batch=tokens_per_batch, progress=progress
    )
    texts = {token: _text(tokenizer, token) for row in rows for token in row.input_ids}
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
    return TokenConflict(tuple(examples), norm, confidence)


def _text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Return a token's text; SentencePiece drops the space before a word where the word stands alone."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def _interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return Student's interval of the mean over the first axis."""
    return jackknife_interval(values.mean(0), means_without_each(values), confidence=confidence)


_AGAINST = "178,24,43"
_WITH = "33,102,172"
_FULL = 0.95
"""Share of the scored tokens whose tint is not yet the darkest."""


def tinted(heading: str, examples: "Sequence[ExampleTokens]") -> str:
    """Render examples as HTML: red tokens are against safety, blue ones with it; what is not scored has no tint."""
    sizes = np.concatenate([np.abs(example.contributions[example.scored]) for example in examples])
    scale = float(np.quantile(sizes, _FULL)) or 1.0
    key = f"{_span('against safety', _AGAINST, 0.6)} {_span('with safety', _WITH, 0.6)} one example per paragraph"
    shown = "".join(_paragraph(example, scale) for example in examples)
    return f"<div><p><b>{escape(heading)}</b></p><p>{key}, the most conflicting first</p>{shown}</div>"


def _paragraph(example: "ExampleTokens", scale: float) -> str:
    tokens = "".join(
        _token(text, float(value), scale) if scored else f'<span style="color:#767676">{escape(text)}</span>'
        for text, value, scored in zip(example.tokens, example.contributions, example.scored, strict=True)
    )
    return f'<p style="white-space:pre-wrap"><b>{example.total:+.3g}</b> {tokens}</p>'


def _token(text: str, value: float, scale: float) -> str:
    colour = _AGAINST if value < 0 else _WITH
    return _span(text, colour, 0.75 * min(abs(value) / scale, 1.0), f"{value:+.3g}")


def _span(text: str, colour: str, opacity: float, hover: str = "") -> str:
    told = f' title="{escape(hover)}"' if hover else ""
    return f'<span{told} style="background:rgba({colour},{opacity:.2f})">{escape(text)}</span>'
