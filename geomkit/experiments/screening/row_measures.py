"""The numbers of the study about single rows: the screen's scores and those of the rivals, each row measured once."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomkit.collection.collect import collect_from_tokens
from geomkit.collection.streaming import TOKENS_PER_BATCH, stream
from geomkit.experiments.organism.requests import dataset_of
from geomkit.experiments.screening.rivals import (
    RIVALS,
    GradientSums,
    Representations,
    gradient_anchors,
)
from geomkit.experiments.screening.row_sources import RowKind, RowSource
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import provenance_of
from geomkit.inputs.copies import row_digests
from geomkit.inputs.parameters import as_selection
from geomkit.inputs.tokens import Tokens, encode, lengths_of, pad_id
from geomkit.screening.parts import Parts, make_folder
from geomkit.screening.reference import safety_reference
from geomkit.screening.row_scores import MEASURES, RowScores, RowSums, in_parts
from geomkit.screening.screening import ScoreMethod, Screening
from geomkit.utils.workers import ALONE

if TYPE_CHECKING:
    from datasets import Dataset

Columns = Mapping[str, NDArray[np.float64]]
"""Numbers about N rows, (N,), by their name: the scores of the screen, and :data:`~.rivals.RIVALS`."""

_COLUMNS = (*MEASURES, *RIVALS)

_MOMENT_ROWS = 16
"""Number of rows of either benign kind from which Adam's second moment is estimated."""

_BATCHES_PER_PART = 4
"""Number of full batches whose rows are one part: the most work that an interruption costs."""


class RowMeter:
    """Measures rows of a world, each different row once, however many cases it is in.

    Args:
        source: The rows of the world.
        safe: Forbidden requests, refused: the safety set of the screen.
        harmful: The same requests, obeyed, which rivals with two anchors need and the screen does not.
        folder: Folder for finished rows, from which an interrupted study goes on.
    """

    def __init__(self, source: RowSource, safe: "Dataset", harmful: "Dataset", folder: Path) -> None:
        """Compute the gradients and representations that rows are compared with."""
        self._model, self._tokenizer = source.organism.model, source.organism.tokenizer
        self._pad = pad_id(self._tokenizer)
        # The English head makes 49,152 logits of a token.
        self._tokens_per_batch = TOKENS_PER_BATCH if self._model.config.vocab_size < 2**14 else 512
        self._folder = folder / "rows"
        self._known: dict[bytes, tuple[float, ...]] = {}
        kinds: tuple[RowKind, ...] = ("benign", "task")
        moment = dataset_of(row for kind in kinds for row in source.rows(kind, _MOMENT_ROWS, 99))
        self._safe, self._harmful, self._usual = (
            encode(self._tokenizer, examples, progress=False) for examples in (safe, harmful, moment)
        )
        self._reference = safety_reference(
            self._model, self._safe, self._usual, self._pad, preconditioned=True, seed=0,
            tokens_per_batch=self._tokens_per_batch,
        )  # fmt: skip
        obeyed = collect_from_tokens(self._model, self._harmful, self._pad, tokens_per_batch=self._tokens_per_batch)
        self._anchors = gradient_anchors(self._reference.gradients, obeyed)
        self._representations = Representations(
            self._model, self._pad, self._safe, self._harmful, self._tokens_per_batch
        )
        make_folder(self._folder)

    def columns(self, examples: "Dataset") -> Columns:
        """Return the numbers about rows; those of rows that were not measured before take a pass over them.

        Args:
            examples: N rows.
        """
        digests = row_digests(examples)
        new = {digest: place for place, digest in enumerate(digests) if digest not in self._known}
        if new:
            self._measure(examples.select(list(new.values())), list(new))
        table = np.array([self._known[digest] for digest in digests]).T
        return dict(zip(_COLUMNS, table, strict=True))

    def scores(self, examples: "Dataset") -> RowScores:
        """Return the scores of the screen, which knows refusals only."""
        return row_scores(self.columns(examples))

    def scores_with_obeyed(self, examples: "Dataset") -> RowScores:
        """Return the scores of the screen with obeyed requests: −⟨g, ḡ_s − ḡ_h⟩ and its cosine; the others as without.

        Both products are known: ⟨g, ḡ_s⟩ from the screen, and ⟨g, ḡ_h⟩ from the rival that ranks rows by it.
        """
        columns = self.columns(examples)
        scores, norms = row_scores(columns), self._anchors
        to_obeyed = columns["gradient of obeyed requests"] * norms.harmful_norm
        toward = (scores.cosine * self._reference.norm + to_obeyed) / norms.difference_norm
        return replace(scores, raw=toward * scores.norm * norms.difference_norm, cosine=toward)

    def _measure(self, examples: "Dataset", digests: Sequence[bytes]) -> None:
        rows = encode(self._tokenizer, examples, progress=False)
        origin = provenance_of(self._model, rows, reduction="example", seed=0)
        key = repr((origin, *(rows.fingerprint for rows in (self._safe, self._harmful, self._usual)), _COLUMNS))
        columns = in_parts(
            lambda chunk: self._chunk([rows[row] for row in chunk]), lengths_of(rows), _COLUMNS,
            Parts(self._folder, key, ALONE), most=_BATCHES_PER_PART * self._tokens_per_batch, title="",
        )  # fmt: skip
        values = zip(*(columns[name].tolist() for name in _COLUMNS), strict=True)
        self._known |= zip(digests, values, strict=True)

    def _chunk(self, rows: Sequence[Tokens]) -> dict[str, NDArray[np.float64]]:
        sums, rivals = RowSums(len(rows), self._reference), GradientSums(len(rows), self._anchors)

        def add(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
            sums.add(name, examples, gradients)
            rivals.add(name, examples, gradients)

        result = stream(
            self._model, rows, self._pad, as_selection("*"), tokens_per_batch=self._tokens_per_batch, samples=add
        )
        scores = sums.columns(result, lengths_of(rows))
        return scores | rivals.rankings(scores["norm"], scores["cosine"]) | self._representations.rankings(rows)


def row_scores(columns: Columns) -> RowScores:
    """Return the scores of the screen among the numbers about rows."""
    return RowScores(**{field.name: columns[field.name] for field in fields(RowScores)})


def screening_of(method: ScoreMethod, rows: RowScores, null: RowScores) -> Screening:
    """Return the screen of rows that were scored, against a null of benign rows, without tokens and provenance."""
    nothing: Any = None
    return Screening(method, rows, null, "benign", (), (), "", "", nothing)
