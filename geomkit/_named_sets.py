"""Sets of examples by name: the safety set with its controls, and whether each has examples enough."""

from collections.abc import Mapping

from geomkit.errors import GeometryError
from geomkit.gradients import GradientSet


def with_controls(
    safety: GradientSet, control: GradientSet | Mapping[str, GradientSet] | None
) -> dict[str, GradientSet]:
    """Return the safety set and the controls by name; a single one is called ``"control"``.

    Raises:
        GeometryError: If a control is called ``"safety"``.
    """
    controls = {} if control is None else {"control": control} if isinstance(control, GradientSet) else dict(control)
    if "safety" in controls:
        raise GeometryError("expected controls by other names than 'safety', which are the anchors; rename the control")
    return {"safety": safety, **controls}


def check_enough(counts: Mapping[str, int], fewest: int) -> None:
    """Check that every set has per-sample gradients enough.

    Raises:
        GeometryError: If one has fewer.
    """
    for name, count in counts.items():
        if count < fewest:
            raise GeometryError(
                f"expected at least {fewest} per-sample gradients in the {name} set, found {count}; collect more, with "
                "per_sample=True"
            )


def counts_of(sets: Mapping[str, GradientSet]) -> dict[str, int]:
    """Return the number of per-sample gradients in each set."""
    return {name: len(found.samples) for name, found in sets.items()}
