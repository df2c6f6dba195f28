"""Checks of arguments that are gradients: their type, and the number of per-sample gradients."""

from collections.abc import Mapping

from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.utils.arguments import type_in_words


def with_controls(
    safety: GradientSet, control: GradientSet | Mapping[str, GradientSet] | None
) -> dict[str, GradientSet]:
    """Return the safety set and the control sets by name; a single control set is named ``"control"``.

    Args:
        safety: The safety set.
        control: A control set, several by name, or ``None``.

    Raises:
        GeometryError: If a control set is named ``"safety"``, or a set is not a :class:`GradientSet`.
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
    """Check that the argument is a mapping from names to sets of gradients.

    Raises:
        GeometryError: If the argument is not a mapping, or a value is not a :class:`GradientSet`, such as examples.
    """
    if not isinstance(sets, Mapping):
        raise GeometryError(
            f'expected sets by name, found {type_in_words(sets)}; give e.g. {{"safety": …, "control": …}}'
        )
    for name, gradients in sets.items():
        if not isinstance(gradients, GradientSet):
            raise _no_gradients(name, gradients)


def check_gradients(name: str, gradients: object) -> None:
    """Check that the argument is a mapping from parameters to gradients, such as a :class:`GradientSet`.

    Args:
        name: Name of the set in the error message.
        gradients: The argument.

    Raises:
        GeometryError: If the argument is something else.
    """
    if not isinstance(gradients, Mapping) or not all(
        isinstance(gradient, LayerGradient) for gradient in gradients.values()
    ):
        raise _no_gradients(name, gradients)


def _no_gradients(name: str, value: object) -> GeometryError:
    return GeometryError(
        f"expected gradients from collect_gradients(..., per_sample=True), found {type_in_words(value)} as the {name} "
        "set; collect them first"
    )


def check_enough(counts: Mapping[str, int], minimum: int) -> None:
    """Check that every set has at least ``minimum`` per-sample gradients.

    Args:
        counts: Number of per-sample gradients of each set, by name.
        minimum: The smallest number allowed.

    Raises:
        GeometryError: If a set has fewer.
    """
    for name, count in counts.items():
        if count < minimum:
            raise GeometryError(
                f"expected at least {minimum} per-sample gradients in the {name} set, found {count}; collect more, "
                "with per_sample=True"
            )


def sample_counts(sets: Mapping[str, GradientSet]) -> dict[str, int]:
    """Return the number of per-sample gradients in each set."""
    return {name: len(gradients.samples) for name, gradients in sets.items()}
