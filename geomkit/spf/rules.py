"""The table of all rules, and looking a rule up by its name."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from geomkit.errors import SPFError
from geomkit.spf.rule import Rule, SafetyLoss
from geomkit.utils.options import check_options

if TYPE_CHECKING:
    import pandas as pd

_BLOCK_PROMISE = "⟨Δθ, g_s⟩ ≤ 0 for every block and step"
_LEFT_PROMISE = _BLOCK_PROMISE + "; UᵀΔθ = 0 for a block that conflicted, except for drift correction"
_TESTS = "tests/spf/test_rules.py::"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                name="rank1",
                level="update",
                scope="block",
                removal="rank1",
                badge="geomkit",
                source="the demonstration code's projection, on the update",
                formula="Δ − g_s ⟨Δ, g_s⟩₊ / ‖g_s‖²",
                promise_text=_BLOCK_PROMISE,
                test=_TESTS + "test_rank1_values",
                when="cheapest rule that keeps the promise",
                drift_correction=True,
            ),
            Rule(
                name="left",
                level="update",
                scope="block",
                removal="left",
                badge="geomkit",
                source="the paper's subspace, on the update; then rank1 with the part of g_s outside it",
                formula="(I − UUᵀ) Δ, then rank1 with (I − UUᵀ) g_s",
                promise_text=_LEFT_PROMISE,
                test=_TESTS + "test_left_values",
                when="short runs in which the anchors must not be learnt, and projection alone has to protect",
                rank=10,
                drift_correction=True,
            ),
            Rule(
                name="mixed-left",
                level="update",
                scope="block",
                removal="left",
                badge="geomkit",
                source="mixing, then left on the optimizer's update",
                formula="mixing, then left with k = 1",
                promise_text=_LEFT_PROMISE,
                test=_TESTS + "test_mixed_left_values",
                when="the model has still to learn the anchors' refusals",
                rank=1,
                safety_gradient_weight=1.0,
                drift_correction=True,
                drift_margin=0.01,
            ),
            Rule(
                name="kl-left",
                level="update",
                scope="block",
                removal="left",
                badge="geomkit",
                source="mixed-left with SafeGrad's loss (arXiv 2508.07172)",
                formula="mixing with KL(before ‖ now), then left with k = 1",
                promise_text=_LEFT_PROMISE,
                test="tests/spf/test_anchors.py::test_rules_with_the_divergence_keep_their_promise_on_forbidden_and_benign_anchors",
                when="to set the weight of the anchors by hand, with mix",
                rank=1,
                safety_gradient_weight=1.0,
                loss="kl",
                drift_correction=True,
                drift_margin=0.01,
            ),
            Rule(
                name="adaptive-kl-left",
                level="update",
                scope="block",
                removal="left",
                badge="geomkit",
                source="mixed-left, SafeGrad's loss (arXiv 2508.07172), weighted as PPO's penalty (arXiv 1707.06347)",
                formula="mixing with w · KL(before ‖ now), w growing with the drift, then left with k = 1",
                promise_text=_LEFT_PROMISE,
                test="tests/spf/test_anchors.py::test_rules_with_the_divergence_keep_their_promise_on_forbidden_and_benign_anchors",
                when="the default: the model has to stay as it is on forbidden and on benign requests",
                rank=1,
                safety_gradient_weight=1.0,
                largest_weight=10.0,
                loss="kl",
                drift_correction=True,
                drift_margin=0.01,
            ),
            Rule(
                name="two-sided",
                level="update",
                scope="block",
                removal="two-sided",
                badge="geomkit",
                source="the subspaces of both sides, on the update",
                formula="(I − UUᵀ) Δ (I − VVᵀ), then rank1 with (I − UUᵀ) g_s (I − VVᵀ)",
                promise_text=_BLOCK_PROMISE
                + "; UᵀΔθ = 0, ΔθV = 0 for a block that conflicted, except for drift correction",
                test=_TESTS + "test_two_sided_values",
                when="to study the subspaces of both sides: they can cost the task",
                rank=10,
                drift_correction=True,
            ),
            Rule(
                name="cone",
                level="update",
                scope="global",
                removal="rank1",
                badge="geomkit",
                source="GEM's quadratic programme (arXiv 1706.08840), on the update, with the anchors as tasks",
                formula="Δ − Jᵀλ, λ = argmin over λ ≥ 0 of ‖Δ − Jᵀλ‖",
                promise_text="⟨Δθ, g_i⟩ ≤ 0 for every anchor i of the step",
                test=_TESTS + "test_cone_values",
                when="when each anchor counts, not only the mean over anchors",
                each_anchor=True,
                drift_correction=True,
            ),
            Rule(
                name="null-space",
                level="update",
                scope="block",
                removal="left",
                badge="geomkit",
                source="Adam-NSCL's projection of updates (arXiv 2103.07113), g_s before training for its features",
                formula="W ← W − U (UᵀW − UᵀW₀), U before training",
                promise_text="UᵀW = UᵀW₀ of every matrix, after every step",
                test=_TESTS + "test_null_space_values",
                when="to study a subspace that no step may enter",
                rank=10,
                closed_subspace=True,
            ),
            Rule(
                name="paper",
                level="gradient",
                scope="global",
                removal="left",
                badge="replicated",
                source="arXiv 2601.10141, Algorithm 1, implemented from the paper (which has one fixed anchor)",
                formula="(I − UUᵀ) g_u",
                test=_TESTS + "test_paper_values",
                when="to reproduce the paper",
                rank=20,
            ),
            Rule(
                name="demo",
                level="gradient",
                scope="block",
                removal="rank1",
                badge="published code",
                source="the paper's public demonstration code",
                formula="g_u − g_s ⟨g_u, g_s⟩₋ / ‖g_s‖²",
                test=_TESTS + "test_demo_values",
                when="to reproduce the paper's demonstration code",
            ),
            Rule(
                name="safegrad",
                level="gradient",
                scope="global",
                removal="rank1",
                badge="from its formula",
                source="SafeGrad (arXiv 2508.07172), with ρ = 1 and KL(before ‖ now) on the anchors",
                formula="g_u − g_a ⟨g_u, g_a⟩₋ / ‖g_a‖² + ρ g_a",
                test=_TESTS + "test_safegrad_values",
                when="to compare with SafeGrad",
                safety_gradient_weight=1.0,
                loss="kl",
            ),
            Rule(
                name="mixing",
                level="gradient",
                scope="block",
                removal="none",
                badge="baseline",
                source="the safety loss added to the task's",
                formula="g_u + g_s",
                test=_TESTS + "test_mixing_values",
                when="as the baseline at equal compute",
                safety_gradient_weight=1.0,
            ),
            Rule(
                name="random",
                level="update",
                scope="block",
                removal="random",
                badge="control",
                source="a random subspace in place of the subspace that left removes",
                formula="(I − RRᵀ) Δ, R random",
                test=_TESTS + "test_random_values",
                when="only as a control in experiments",
                rank=10,
            ),
            Rule(
                name="norm-matched",
                level="update",
                scope="block",
                removal="norm-matched",
                badge="control",
                source="a random direction, with the norm that rank1 would remove",
                formula="Δ − E ⟨Δ, g_s⟩₊ / ‖g_s‖, ‖E‖ = 1 random",
                test=_TESTS + "test_norm_matched_values",
                when="only as a control in experiments",
            ),
            Rule(
                name="monitor",
                level="gradient",
                scope="block",
                removal="none",
                badge="control",
                source="a plain fine-tune, only measured",
                formula="g_u",
                test=_TESTS + "test_monitor_values",
                when="to certify a plain fine-tune without changing it",
            ),
        )
    }
)
"""Every rule by name; see :func:`get_rule` for a rule with changed settings."""

DEFAULT_RULE = "adaptive-kl-left"
"""The rule of a :class:`geomkit.SPF` that names no rule: the best one on the real model of data/experiments."""

_OLD_NAMES = {"measure": "monitor"}
"""Former names of rules, which grids of experiments still use."""


def rules() -> "pd.DataFrame":
    """Return a table of all rules, one row per rule.

    Returns:
        The columns ``rule``, ``level``, ``badge``, ``formula``, ``promise``, ``when``, ``source`` and ``test``; see
        :class:`~geomkit.spf.rule.Rule`.

    Example:
        >>> rules().set_index("rule").loc["demo", "formula"]
        'g_u − g_s ⟨g_u, g_s⟩₋ / ‖g_s‖²'
        >>> rules().set_index("rule").loc["rank1", "when"]
        'cheapest rule that keeps the promise'
    """
    import pandas as pd

    columns = ("name", "level", "badge", "formula", "promise_text", "when", "source", "test")
    rows = [{column: getattr(rule, column) for column in columns} for rule in RULES.values()]
    return pd.DataFrame(rows).rename(columns={"name": "rule", "promise_text": "promise"})


def get_rule(
    rule: str | Rule,
    rank: int | None = None,
    *,
    drift_correction: bool | None = None,
    drift_margin: float | None = None,
    mix: float | None = None,
    largest_mix: float | None = None,
    loss: SafetyLoss | None = None,
) -> Rule:
    """Return a rule by name, with some of its settings changed.

    Args:
        rule: A name in :data:`RULES`, or a rule.
        rank: Rank of the protected subspace.
        drift_correction: Whether drift is corrected.
        drift_margin: Tolerated drift, nats per token.
        mix: Multiple of the safety gradient that is added to the utility gradient; the smallest, where it grows.
        largest_mix: Largest multiple, to which it grows with the drift of the safety loss.
        loss: The safety loss.

    Raises:
        SPFError: If the name or the loss is unknown, the rule has no subspace to give a rank or does not go with the
            loss, or a number is out of its range.

    Example:
        >>> get_rule("left", rank=5).rank
        5
    """
    numbers = {"rank": rank, "drift_margin": drift_margin, "mix": mix, "largest_mix": largest_mix}
    check_options(numbers, error=SPFError)
    if isinstance(rule, str):
        name = _OLD_NAMES.get(rule, rule)
        if name not in RULES:
            raise SPFError(f"expected one of the rules {', '.join(RULES)}, found '{rule}'; choose one of these")
        rule = RULES[name]
    elif not isinstance(rule, Rule):
        raise SPFError(f"expected a rule or its name, found {rule!r:.40}; give one of {', '.join(RULES)}")
    if loss is not None and loss not in get_args(SafetyLoss):
        raise SPFError(f"expected loss to be one of {', '.join(get_args(SafetyLoss))}, found {loss!r:.40}")
    if rank is not None and not rule.has_subspace:
        raise SPFError(
            f"expected a rank for a rule that removes a subspace only, found {rank} for '{rule.name}'; leave it out"
        )
    # All at once, as some settings go together only.
    settings: dict[str, Any] = {
        "rank": rank,
        "drift_correction": drift_correction,
        "drift_margin": None if drift_margin is None else float(drift_margin),
        "safety_gradient_weight": None if mix is None else float(mix),
        "largest_weight": None if largest_mix is None else float(largest_mix),
        "loss": loss,
    }
    changes = {name: value for name, value in settings.items() if value is not None}
    return replace(rule, **changes) if changes else rule
