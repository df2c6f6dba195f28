"""Sets of examples by name: whether they are gradients at all, and whether each has examples enough."""

from collections.abc import Mapping

from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.utils.arguments import type_in_words


def with_controls(
    safety: GradientSet, control: GradientSet | Mapping[str, GradientSet] | None
) -> dict[str, GradientSet]:
    """Return the safety set and the controls by name; a single one is called ``"control"``.

    Raises:
        GeometryError: If a control is called ``"safety"``, or one of them is no set of gradients.
    """
    if control is not None and not isinstance(control, Mapping):
        raise _no_gradients("control", control)
    controls = {} if control is None else {"control": control} if isinstance(control, GradientSet) else dict(control)
    if "safety" in controls:
        raise GeometryError("expected controls by other names than 'safety', which are the anchors; rename the control")
    sets = {"safety": safety, **controls}
    check_sets(sets)
    return sets


def check_sets(sets: object) -> None:
    """Check that every set is one of gradients, and not of the examples that they are to be collected from.

    Raises:
        GeometryError: If one is not, or they have no names.
    """
    if not isinstance(sets, Mapping):
        raise GeometryError(
            f'expected sets by name, found {type_in_words(sets)}; give e.g. {{"safety": …, "control": …}}'
        )
    for name, found in sets.items():
        if not isinstance(found, GradientSet):
            raise _no_gradients(name, found)


def check_gradients(name: str, gradients: object) -> None:
    """Check that it is a set of gradients, or gradients by parameter.

    Raises:
        GeometryError: If it is not.
    """
    if not isinstance(gradients, Mapping) or not all(
        isinstance(gradient, LayerGradient) for gradient in gradients.values()
    ):
        raise _no_gradients(name, gradients)


def _no_gradients(name: str, found: object) -> GeometryError:
    return GeometryError(
        f"expected gradients from collect_gradients(..., per_sample=True), found {type_in_words(found)} as the {name} "
        "set; collect them first"
    )


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


def sample_counts(sets: Mapping[str, GradientSet]) -> dict[str, int]:
    """Return the number of per-sample gradients in each set."""
    return {name: len(found.samples) for name, found in sets.items()}
