"""What is kept of every step: numbers, per step and per block."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from geomkit.errors import SPFError
from geomkit.utils.files import write_atomically

BLOCK_COLUMNS = ("first_order_raw", "first_order", "fired", "removed", "leak")
"""What is kept of a block: ⟨Δθ, g_s⟩ before and after, whether it fired, the norm removed, and the leak."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: Number of the step, from 1.
        fresh: Whether the safety gradient was measured for this step, rather than for an earlier one.
        anchor_loss: Safety loss on the step's anchors before the step, nats per token; of a step that is not fresh,
            when they were last measured.
        loss_after: The same anchors' loss after the step; NaN where it was not measured.
        first_order_raw: Σ ⟨Δθ, g_s⟩ of the optimizer's own update, nats per token.
        first_order: Σ ⟨Δθ, g_s⟩ of the update that was applied.
        bound: What Σ ⟨Δθ, g_s⟩ may be: 0, or less where drift is corrected.
        worst: The largest ⟨Δθ, g_s⟩ in the applied update of what the rule promises something of: of a single block,
            or of a single anchor.
        tolerance: What rounding the weights alone can add to Σ ⟨Δθ, g_s⟩.
        update_norm: ‖Δθ‖ of the applied update, estimated from four random projections of each block: within a few per
            cent for a model of many blocks, within a third for a single one.
        fired: Share of the blocks whose step was projected.
        removed: Norm of what was removed from the step.
        corrected: Norm of what was added for drift and the fence.
        leak: Norm of the coordinates that should have been removed and were not, relative to what they were.
        violated: Whether what the rule promises does not hold beyond rounding; of a rule that promises nothing,
            whether the update raised the safety loss to first order.
        blocks: By block, the numbers of :data:`BLOCK_COLUMNS`.
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
    violated: bool
    blocks: Mapping[str, np.ndarray] = field(repr=False, compare=False)

    @property
    def curvature(self) -> float:
        """What the step changed the safety loss by beyond first order, nats per token; NaN where it is not known."""
        return self.loss_after - self.anchor_loss - self.first_order if self.fresh else math.nan

    def numbers(self) -> dict[str, Any]:
        """Return everything but the blocks, and the curvature."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "blocks"}
        return own | {"curvature": self.curvature}

    def to_json(self) -> str:
        """Return one line; what is not finite is null."""
        own = {name: _finite(value) for name, value in self.numbers().items()}
        blocks = {
            name: dict(zip(BLOCK_COLUMNS, (_finite(float(value)) for value in values), strict=True))
            for name, values in self.blocks.items()
        }
        return json.dumps(own | {"blocks": blocks}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "StepRecord":
        """Read what :meth:`to_json` wrote."""
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
    """A JSON-lines file that grows by a line per step.

    Args:
        path: The file, which exists.
    """

    def __init__(self, path: Path) -> None:
        """Go on with a file."""
        self._path = path

    @classmethod
    def begun(cls, path: Path) -> "Log":
        """Start an empty file.

        Raises:
            SPFError: If there is something at the path.
        """
        if path.exists() and path.stat().st_size:
            raise SPFError(f"expected a new file at {path}, found one with something in it; move it, or resume its run")
        write_atomically(path, "")
        return cls(path)

    @classmethod
    def resumed(cls, path: Path, steps: int) -> "tuple[Log, list[StepRecord]]":
        """Go on with a file: what was written after the step that a run is resumed from is dropped.

        Args:
            path: The file.
            steps: How many steps had been taken.

        Returns:
            The log, and the records of these steps.

        Raises:
            SPFError: If steps are missing, or a line cannot be read.
        """
        kept = path.read_text(encoding="utf-8").splitlines()[:steps] if path.is_file() else []
        try:
            records = [StepRecord.from_json(line) for line in kept]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SPFError(f"expected a certificate at {path}, found {type(error).__name__}: {error}") from None
        if [record.step for record in records] != list(range(1, steps + 1)):
            raise SPFError(f"expected the certificate of {steps} steps at {path}, found {len(records)}; start anew")
        write_atomically(path, "".join(f"{line}\n" for line in kept))
        return cls(path), records

    def write(self, record: StepRecord) -> None:
        """Append a step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
