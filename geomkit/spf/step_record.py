"""The record of one step, in numbers per step and per block, and the file that records are written to."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from geomkit.errors import SPFError
from geomkit.utils.files import reading, write_atomically, writing

BLOCK_COLUMNS = ("first_order_raw", "first_order", "fired", "removed", "leak")
"""The numbers of a block: ⟨Δθ, g_s⟩ before and after correction, whether it was projected, the norm removed, leak."""

LOG_NAME = "spf.jsonl"
"""The file of the records of a fine-tune, in its folder."""


@dataclass(frozen=True)
class StepRecord:
    """The record of one optimizer step.

    Attributes:
        step: Number of the step, from 1.
        fresh: Whether the safety gradient was measured for this step, rather than for an earlier step.
        anchor_loss: Safety loss on the step's anchors before the step, nats per token; for a step that is not fresh,
            the loss at the last measurement.
        loss_after: Safety loss on the same anchors after the step; NaN where it was not measured.
        first_order_raw: Σ ⟨Δθ, g_s⟩ of the optimizer's own update, nats per token.
        first_order: Σ ⟨Δθ, g_s⟩ of the applied update.
        bound: Upper bound of Σ ⟨Δθ, g_s⟩: 0, or less where drift is corrected.
        worst: Largest ⟨Δθ, g_s⟩ of a single block in the applied update, or of a single anchor where the rule's promise
            is about anchors.
        tolerance: Largest change of Σ ⟨Δθ, g_s⟩ that rounding the weights can cause.
        update_norm: ‖Δθ‖ of the applied update, estimated from four random projections of each block: within a few per
            cent for a model of many blocks, within a third for a single block.
        fired: Fraction of the blocks whose step was projected.
        removed: Norm of the part that was removed from the step.
        corrected: Norm of the correction that was added for drift and the benign fence.
        leak: Norm of the conflicting part that remains after the corrections, relative to its norm before.
        shortfall: Largest share, over the blocks, of the energy of the exact singular vectors that a protected subspace
            missed when it was computed; estimated, see
            :class:`~geomkit.svd.subspace_iteration.LeadingVectors`. 0 for a rule without such a subspace.
        violated: Whether the rule's promise is broken beyond rounding; for a rule without a promise, whether the update
            raised the safety loss to first order.
        blocks: For each block, the numbers of :data:`BLOCK_COLUMNS`.
    """

    step: int
    fresh: bool
    anchor_loss: float
    loss_after: float
    first_order_raw: float
    first_order: float
    bound: float
    worst: float
    tolerance: float
    update_norm: float
    fired: float
    removed: float
    corrected: float
    leak: float
    shortfall: float
    violated: bool
    blocks: Mapping[str, np.ndarray] = field(repr=False, compare=False)

    @property
    def curvature(self) -> float:
        """The change of the safety loss beyond first order, nats per token; NaN where it was not measured."""
        return self.loss_after - self.anchor_loss - self.first_order if self.fresh else math.nan

    def numbers(self) -> dict[str, Any]:
        """Return all fields but the blocks, and the curvature, by name."""
        values = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "blocks"}
        return values | {"curvature": self.curvature}

    def to_json(self) -> str:
        """Return the record as one line of JSON, with null for numbers that are not finite."""
        numbers = {name: _finite(value) for name, value in self.numbers().items()}
        blocks = {
            name: dict(zip(BLOCK_COLUMNS, (_finite(float(value)) for value in values), strict=True))
            for name, values in self.blocks.items()
        }
        return json.dumps(numbers | {"blocks": blocks}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "StepRecord":
        """Return the record of a line that :meth:`to_json` wrote."""
        content = json.loads(line)
        content.pop("curvature")
        blocks = {
            name: np.array([values[column] for column in BLOCK_COLUMNS], dtype=np.float32)  # null is NaN
            for name, values in content.pop("blocks").items()
        }
        numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in content.items()}
        return cls(**numbers, blocks=blocks)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """A JSON-lines file to which each step appends its record.

    Args:
        path: The file, which exists.
    """

    def __init__(self, path: Path) -> None:
        """Append to an existing file."""
        self._path = path

    @classmethod
    def begun(cls, path: Path) -> "Log":
        """Start an empty file.

        Raises:
            SPFError: If the file exists and is not empty.
            DataError: If it cannot be written.
        """
        with reading(path):
            begun = path.exists() and path.stat().st_size > 0
        if begun:
            raise SPFError(f"expected a new file at {path}, found a file with records; move it, or resume its run")
        write_atomically(path, "")
        return cls(path)

    @classmethod
    def resumed(cls, path: Path, steps: int) -> "tuple[Log, list[StepRecord]]":
        """Continue a file, without the records after the step that a run is resumed from.

        Args:
            path: The file.
            steps: Number of steps before the resumed run.

        Returns:
            The log, and the records of these steps.

        Raises:
            SPFError: If steps are missing, or a line cannot be read.
            DataError: If the file cannot be read or written.
        """
        try:
            with reading(path):
                lines = path.read_text(encoding="utf-8").splitlines()[:steps] if path.is_file() else []
            records = [StepRecord.from_json(line) for line in lines]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise SPFError(
                f"expected a certificate at {path}, found {type(error).__name__}: {error}; put the file back as it "
                "was, or start anew"
            ) from None
        if [record.step for record in records] != list(range(1, steps + 1)):
            raise SPFError(f"expected the certificate of {steps} steps at {path}, found {len(records)}; start anew")
        write_atomically(path, "".join(f"{line}\n" for line in lines))
        return cls(path), records

    def write(self, record: StepRecord) -> None:
        """Append the record of a step."""
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
