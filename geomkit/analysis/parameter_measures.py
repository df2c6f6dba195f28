"""The measurements of an analysis on one parameter at a time, so that nothing large outlives its parameter."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geomkit.gradients.arithmetic import gram
from geomkit.gradients.checks import check_enough, check_sets, sample_counts
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.layer_measure import LayerMeasure, measure_layer
from geomkit.svd.nulls import NullDraws, enough_draws
from geomkit.svd.one_sample.pooled import pooled_places
from geomkit.svd.one_sample.study import ParameterTable, parameter_table
from geomkit.svd.spectrum import example_groups
from geomkit.svd.subspaces import LayerSubspace, leading_subspace
from geomkit.svd.token_matching import match_tokens, matched_parts, weighted_sum
from geomkit.utils.arguments import check_finite
from geomkit.utils.precision import full_precision
from geomkit.utils.seeding import parameter_generator

_MIN_EXAMPLES = 3
_GROUPS = 16
"""Largest number of groups of examples of which one is left out at a time."""


@dataclass(frozen=True, eq=False)
class ParameterMeasures:
    """All measurements, by parameter.

    Attributes:
        places: Places of each set among the pooled examples.
        grams: (N, N) inner products between the pooled examples of all sets.
        spectra: For each set, the spectrum of the mean gradient of every linear layer, at equal token counts.
        subspaces: For the safety and the utility set, the leading left subspace of the same mean gradients.
        one_sample: Overlaps of single safety and control examples with the mean safety gradient.
    """

    places: Mapping[str, slice]
    grams: dict[str, Tensor] = field(default_factory=dict)
    spectra: dict[str, dict[str, LayerMeasure]] = field(default_factory=dict)
    subspaces: dict[str, dict[str, LayerSubspace]] = field(default_factory=dict)
    one_sample: dict[str, ParameterTable] = field(default_factory=dict)

    def between(self, a: str, b: str) -> dict[str, Tensor]:
        """Return the inner products between the examples of two sets, by parameter."""
        return {name: products[self.places[a], self.places[b]] for name, products in self.grams.items()}


def measure_parameters(
    sets: Mapping[str, GradientSet], *, rank: int, null_draws: int, seed: int, progress: bool
) -> ParameterMeasures:
    """Return the measurements on every parameter of the sets ``"safety"``, ``"control"`` and ``"utility"``.

    Beside the gradients of the examples, memory holds one parameter's gradients and small tables.

    Args:
        sets: Gradients collected with ``per_sample=True`` and ``form="factored"``.
        rank: Number of directions of the subspaces that are compared.
        null_draws: Largest number of draws from the null of a spectrum, see :func:`geomkit.svd.nulls.enough_draws`.
        seed: Seed of all random draws.
        progress: Show a bar, in parameters.

    Raises:
        GeometryError: If a set lacks per-sample gradients, has fewer than three examples or a value that is not finite,
            or no parameter is factored in all sets.
    """
    from tqdm.auto import tqdm

    check_sets(sets)
    check_enough(sample_counts(sets), _MIN_EXAMPLES)
    samples = [sample for gradients in sets.values() for sample in gradients.samples]
    measures = ParameterMeasures(pooled_places(sample_counts(sets)), spectra={name: {} for name in sets})
    measures.subspaces.update(safety={}, utility={})
    parameters = shared_layers(*samples)
    with full_precision(), tqdm(total=len(parameters), desc="geometry", unit="parameter", disable=not progress) as bar:
        for name in parameters:
            pooled = [sample[name] for sample in samples]
            products = gram(pooled, pooled, products=torch.promote_types(torch.float32, pooled[0].dtype))
            check_finite(products, name)
            measures.grams[name] = products
            measures.one_sample[name] = _one_sample(measures.places, pooled, products, rank)
            _measure_spectra(measures, sets, name, rank, null_draws, seed)
            bar.update()
    if not any(measures.spectra.values()):
        match_tokens(*sets.values(), seed=seed)  # raises the error that tells why nothing could be matched
    return measures


def _one_sample(
    places: Mapping[str, slice], pooled: list[LayerGradient], products: Tensor, rank: int
) -> ParameterTable:
    """Return the table of the anchors, which are the safety examples, and the controls."""
    compared = slice(places["safety"].start, places["control"].stop)
    anchors = places["safety"]
    return parameter_table(
        pooled[compared],
        anchors.stop,
        rank,
        "left",
        products[anchors, compared],
        products.diagonal()[compared],
    )


def _measure_spectra(
    measures: ParameterMeasures, sets: Mapping[str, GradientSet], name: str, rank: int, null_draws: int, seed: int
) -> None:
    """Add the spectra of a parameter's mean gradients at equal token counts, and their leading subspaces.

    A mean over more tokens has a higher rank, so spectra are compared at equal token counts.
    """
    matched = matched_parts(list(sets.values()), name, seed)
    if matched is None or min(matched[0][0].matrix_shape) < 2:
        return
    # The sets have as many tokens each, and so the same random directions.
    bound = min(*matched[0][0].matrix_shape, sum(part.tokens for part in matched[0]))
    null = NullDraws(enough_draws(bound, null_draws), parameter_generator(seed, name))
    for (set_name, gradients), parts in zip(sets.items(), matched, strict=True):
        weights = gradients.weights * len(parts)
        mean = weighted_sum(parts, gradients.weights.tolist())
        scaled = [part if weight == 1 else part.scaled(weight) for part, weight in zip(parts, weights, strict=True)]
        measure = measure_layer(
            name,
            mean,
            scaled,
            example_groups(gradients, _GROUPS, seed),
            null,
            vectors=set_name in measures.subspaces,
        )
        if measure.left is not None and set_name in measures.subspaces:
            values = measure.spectrum.singular_values
            measures.subspaces[set_name][name] = leading_subspace(name, values, measure.left, rank, mean.matrix_shape)
        measures.spectra[set_name][name] = measure.kept()
