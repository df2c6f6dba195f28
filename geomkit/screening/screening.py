"""The result of a screen: a score per row with its null, p- and q-values, and the data set without what stands out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from geomkit.correlation.token_conflict import ExampleTokens, tinted
from geomkit.errors import DataError, GeometryError
from geomkit.gradients.provenance import Provenance
from geomkit.inputs.copies import row_digests
from geomkit.inputs.examples import check_examples
from geomkit.inputs.tokens import EncodedExamples, conversations_of
from geomkit.screening.row_scores import RowScores
from geomkit.stats.conditional_null import outside, standardized, upper_p_values
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.utils.display import counted, html_table, joined
from geomkit.utils.figures import DrawnResult, draw, is_figure_file
from geomkit.utils.options import check_option
from geomkit.utils.saved_files import damaged
from geomkit.utils.saving import load, save, saveable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from datasets import Dataset

ScoreMethod = Literal["cosine", "raw", "adam"]
"""The scores that rows can be ranked by, see :class:`~geomkit.screening.row_scores.RowScores`."""

NullKind = Literal["benign", "shuffled"]
"""The rows of the null: benign rows that were given, or the training rows with their answers shuffled."""


def check_method(method: str) -> ScoreMethod:
    """Return a method by its name.

    Raises:
        GeometryError: If there is none of this name.
    """
    for known in get_args(ScoreMethod):
        if method == known:
            return cast("ScoreMethod", known)
    raise GeometryError(f"expected a method among {', '.join(get_args(ScoreMethod))}, found {method!r:.40}; choose one")


LEVEL = 0.1
"""Default false-discovery level."""

_SHIFTED = 0.25
"""Share of rows with p ≤ .05 from which on the set as a whole differs from the null."""

_WORDS = 3  # tokens of a row in the data frame


@saveable
@dataclass(frozen=True, eq=False)
class Screening(DrawnResult):
    """What each training row would do to the loss on refusals, to first order, against rows that are known as benign.

    Attributes:
        method: The score that rows are ranked by.
        rows: Scores of the N training rows.
        null: Scores of the rows of the null.
        null_kind: What the rows of the null are.
        top: Numbers of the rows with the highest scores, the highest first.
        top_tokens: The tokens of these rows; contributions are negative where learning the token raises the safety
            loss. Empty if ``token_note`` says why.
        token_note: The reason why the tokens' contributions are missing.
        data: Fingerprint of the training rows' texts, which :meth:`clean` compares.
        provenance: Model, training data and settings.
        shared: Number of training rows that are rows of the null, too.
        obeyed: Number of obeyed requests whose mean gradient was subtracted from the safety gradient; if there are any,
            the safety loss is log p(obeying) − log p(refusing).
        obeyed_trained: Number of training rows that are among the obeyed requests, too.
    """

    method: ScoreMethod
    rows: RowScores = field(repr=False)
    null: RowScores = field(repr=False)
    null_kind: NullKind
    top: tuple[int, ...] = field(repr=False)
    top_tokens: tuple[ExampleTokens, ...] = field(repr=False)
    token_note: str = field(repr=False)
    data: str = field(repr=False)
    provenance: Provenance = field(repr=False)
    shared: int = field(default=0, repr=False)
    obeyed: int = field(default=0, repr=False)
    obeyed_trained: int = field(default=0, repr=False)

    # ------------------------------------------------------------------------------------------------- values

    @cached_property
    def scores(self) -> np.ndarray:
        """(N,) score of each row: its distance from null rows of as many scored tokens, in units of their spread.

        Above 0 the row raises the safety loss more than null rows of its length. See
        :func:`geomkit.stats.conditional_null.standardized`.
        """
        return self._standardized[0]

    @cached_property
    def null_scores(self) -> np.ndarray:
        """(n,) the same for the rows of the null, each without itself among its neighbours."""
        return self._standardized[1]

    @cached_property
    def p_values(self) -> np.ndarray:
        """(N,) probability that a null row has a score as high; see :func:`~.conditional_null.upper_p_values`."""
        return upper_p_values(self.scores, self.null_scores)

    @cached_property
    def q_values(self) -> np.ndarray:
        """(N,) false-discovery rate of the rows with a p-value as low (Benjamini and Hochberg 1995)."""
        return benjamini_hochberg(self.p_values)

    @cached_property
    def beyond_null(self) -> np.ndarray:
        """(N,) whether a row has fewer or more scored tokens than every row of the null, so that its p is a guess."""
        return outside(self.rows.loss_tokens, self.null.loss_tokens)

    @cached_property
    def _standardized(self) -> tuple[np.ndarray, np.ndarray]:
        return standardized(
            getattr(self.rows, self.method),
            np.log(self.rows.loss_tokens),
            getattr(self.null, self.method),
            np.log(self.null.loss_tokens),
        )

    def flagged(self, level: float = LEVEL) -> np.ndarray:
        """Return the numbers of the rows with a q-value up to a false-discovery level, the highest score first.

        Args:
            level: The share of the returned rows that may be false discoveries, between 0 and 1.

        Raises:
            DataError: If the level is not between 0 and 1.
        """
        check_option("level", level)
        order = np.argsort(-self.scores, kind="stable")
        return np.asarray(order[self.q_values[order] <= level])

    # ------------------------------------------------------------------------------------------------- the data

    def clean(self, examples: "Dataset | EncodedExamples", level: float = LEVEL) -> "Dataset":
        """Return the training rows without the rows that exceed a false-discovery level.

        Args:
            examples: The rows that were screened, in the same order.
            level: The false-discovery level, see :meth:`flagged`.

        Returns:
            The other rows, with all their columns.

        Raises:
            DataError: If the examples are not those that were screened, no row is left, or the level is not between 0
                and 1.
        """
        rows = conversations_of(examples)
        check_examples(rows)
        if len(rows) != len(self.rows) or texts_fingerprint(rows) != self.data:
            raise DataError(
                f"expected the {len(self.rows)} rows that were screened, in their order, found {len(rows)} rows with "
                "other texts; give the same examples"
            )
        dropped = set(self.flagged(level).tolist())
        if len(dropped) == len(rows):
            raise DataError(
                f"expected a row that is left, found all {len(rows)} beyond the false-discovery level {level}: the set "
                "as a whole differs from the null; look at plot() first, or give a lower level"
            )
        return rows.select([row for row in range(len(rows)) if row not in dropped])

    @property
    def question(self) -> str:
        """What the screen answers, as text: the title of its figure."""
        return f"Which rows {'make obeying likelier than refusing' if self.obeyed else 'raise the loss on refusals'}?"

    @property
    def caution(self) -> str:
        """What makes the p-values doubtful, as text; empty if nothing does."""
        doubts = []
        if self.null_kind == "shuffled":
            doubts.append(
                "the null is made of shuffled pairs, which have other losses than rows that belong together; give "
                "benign= rows of the same kind"
            )
        if self.shared:
            doubts.append(
                f"{counted(self.shared, 'training row')} among the null rows, which make their own scores look usual; "
                "give benign= rows that are not trained on"
            )
        if self.obeyed_trained:
            among = counted(self.obeyed_trained, "training row")
            doubts.append(f"{among} among the obeyed requests, whose own gradients raise their scores")
        if beyond := int(self.beyond_null.sum()):
            doubts.append(f"{counted(beyond, 'row')} shorter or longer than every null row")
        harms = "makes obeying likelier than refusing" if self.obeyed else "raises the safety loss"
        if (share := float((self.p_values <= 0.05).mean())) > _SHIFTED:
            doubts.append(
                f"{share:.0%} of the rows have p ≤ .05: the set as a whole {harms} more than the null rows do, because "
                "most rows do harm or because the null rows are of another format or language"
            )
        if self.token_note:
            doubts.append(f"no contributions of tokens: {self.token_note}")
        return "; ".join(doubts)

    # ------------------------------------------------------------------------------------------------- display

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per training row, in the order of the set.

        The columns are ``row``; ``score``, ``p`` and ``q``; ``raw``, ``cosine`` and ``adam``; ``share`` in the safety
        subspace; ``norm``, ``loss``, ``tokens`` and ``loss_tokens``; ``beyond_null``, see :attr:`beyond_null`; and
        ``carried_by``, the tokens that raise the safety loss most, for the rows with the highest scores.
        """
        import pandas as pd

        carried = np.full(len(self.rows), "", dtype=object)
        for row, example in zip(self.top, self.top_tokens, strict=bool(self.top_tokens)):
            carried[row] = "  ".join(_worst_tokens(example))
        return pd.DataFrame(
            {
                "row": np.arange(len(self.rows)),
                "score": self.scores,
                "p": self.p_values,
                "q": self.q_values,
                "raw": self.rows.raw,
                "cosine": self.rows.cosine,
                "adam": self.rows.adam,
                "share": self.rows.share,
                "norm": self.rows.norm,
                "loss": self.rows.loss,
                "tokens": self.rows.tokens.astype(int),
                "loss_tokens": self.rows.loss_tokens.astype(int),
                "beyond_null": self.beyond_null,
                "carried_by": carried,
            }
        )

    def plot(self, level: float = LEVEL) -> "go.Figure":
        """Draw the scores beside the null's, and the top rows, see :func:`geomkit.plots.screening.plot_screening`."""
        return draw("plot_screening", self, level=level)

    def __str__(self) -> str:
        """Return the number of rows beyond the default level, the null, and what makes the p-values doubtful."""
        harm = "make obeying likelier than refusing" if self.obeyed else "raise the safety loss"
        kind = "benign rows" if self.null_kind == "benign" else "shuffled pairs"
        text = (
            f"{len(self.flagged())} of {len(self.rows)} rows {harm} beyond {len(self.null)} {kind} at a "
            f"false-discovery level of {LEVEL:.0%} ({self.method}; smallest q {self.q_values.min():.2g})"
        )
        return f"{text}; caution: {self.caution}" if self.caution else text

    def _repr_html_(self) -> str:
        table = html_table(str(self), self.to_frame().sort_values("score", ascending=False, ignore_index=True))
        shown = [example for example in self.top_tokens if example.scored.any()][:5]
        return joined(table, tinted("The rows with the highest scores", shown)) if shown else table

    # ------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Save the result in a folder, from which :func:`load_screening` loads it, or its figure in a file.

        Args:
            path: A folder: a saved screening in it is replaced in one step, other files stay, and the texts of the rows
                are not saved. Or a file for the figure, see :meth:`geomkit.utils.figures.DrawnResult.save`.

        Returns:
            The path.

        Raises:
            DataError: If a figure cannot be written.
        """
        return super().save(path) if is_figure_file(path) else save("screening", self, path)


def load_screening(folder: str | Path) -> Screening:
    """Return the result that :meth:`Screening.save` wrote to a folder, bit for bit.

    Args:
        folder: The folder.

    Raises:
        DataError: If there is no such result, the files are damaged or do not belong together, or a later version of
            geomkit wrote them.
    """
    screening = load("screening", folder, Screening)
    sizes = [{np.shape(column) for column in vars(scores).values()} for scores in (screening.rows, screening.null)]
    if any(len(shapes) > 1 for shapes in sizes) or any(row >= len(screening.rows) for row in screening.top):
        raise damaged("screening", Path(folder), "scores that do not fit together")
    return screening


def texts_fingerprint(examples: "Dataset") -> str:
    """Return a fingerprint of the conversations of examples, in order."""
    return hashlib.sha256(b"".join(row_digests(examples))).hexdigest()


def _worst_tokens(example: ExampleTokens) -> Sequence[str]:
    order = np.argsort(np.where(example.scored, example.contributions, np.inf), kind="stable")[:_WORDS]
    return [example.tokens[place].strip() for place in order if example.contributions[place] < 0]
