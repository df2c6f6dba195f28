"""The rules: what is asked of a step, and what is removed from it where it conflicts with safety.

Everything is said of a *step* d: the optimizer's update Δθ, or −g_u where the utility gradient itself is projected.
To first order a step changes the safety loss by ⟨d, g_s⟩, so it *conflicts* when ⟨d, g_s⟩ > 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from geomkit.errors import SPFError

if TYPE_CHECKING:
    import pandas as pd

Level = Literal["gradient", "update"]
Scope = Literal["global", "block"]
Removal = Literal["rank1", "left", "two-sided", "random", "norm-matched", "nothing"]
Promise = Literal["every block", "every anchor", "subspace", "nothing"]
Badge = Literal["own", "replicated", "published code", "from its formula", "baseline", "control"]
SafetyLoss = Literal["refusal", "kl"]

_SUBSPACES = ("left", "two-sided", "random")


@dataclass(frozen=True)
class Rule:
    """One way to keep a step from conflicting with safety.

    Attributes:
        name: Its name in :data:`RULES`.
        level: ``"gradient"``: the utility gradient is projected and then handed to the optimizer, whose momentum,
            preconditioner and weight decay may put the conflict back. ``"update"``: the optimizer's own update is
            projected, so the constraint holds for what is applied.
        scope: ``"global"`` tests the conflict once over all blocks, ``"block"`` once per block.
        removal: What goes: ``"rank1"`` the component along g_s; ``"left"`` everything in the span of the top ``rank``
            left singular vectors of g_s; ``"two-sided"`` in that of the left and in that of the right ones;
            ``"random"`` in a random span; ``"norm-matched"`` as much as ``"rank1"`` removes, in a random direction.
        badge: Where it comes from: geomkit's ``"own"``, ``"replicated"`` (an independent reading of the paper),
            ``"published code"``, ``"from its formula"`` (no code was to be had), ``"baseline"`` or ``"control"``.
        source: The paper or code, and how the rule differs.
        formula: What happens to a step that conflicts.
        guarantee: What is promised of the applied update.
        test: The test that pins it.
        rank: k of the subspaces.
        each_anchor: Whether every anchor's own gradient is a constraint, rather than their mean's.
        always: Whether the subspace is closed to all steps, in conflict or not, and never computed anew.
        adds: Multiple of g_s that is added to the utility gradient.
        loss: ``"refusal"``: cross-entropy on the anchors' refusals; ``"kl"``: the KL divergence from the model before
            training on the same tokens.
        drift_correction: Also undo what earlier steps did beyond first order: where the anchors' loss L_s exceeds its
            value L_ref before training, demand Σ ⟨Δθ, g_s⟩ ≤ L_ref − L_s of the applied update.
        drift_margin: How far L_s may exceed it before that is asked, and what it then comes back to, nats per token.
    """

    name: str
    level: Level
    scope: Scope
    removal: Removal
    badge: Badge = "own"
    source: str = ""
    formula: str = ""
    guarantee: str = "nothing"
    test: str = ""
    rank: int = 0
    each_anchor: bool = False
    always: bool = False
    adds: float = 0.0
    loss: SafetyLoss = "refusal"
    drift_correction: bool = False
    drift_margin: float = 0.0

    def __post_init__(self) -> None:
        """Check that the parts go together.

        Raises:
            SPFError: If they do not.
        """
        wrong = [
            (self.has_subspace != (self.rank > 0), "a rank for those that remove a subspace, and for these alone"),
            (self.always and self.removal != "left", "the left subspace for one that is closed to all steps"),
            (
                self.each_anchor and (self.scope, self.removal, self.loss) != ("global", "rank1", "refusal"),
                "scope 'global', removal 'rank1' and the loss 'refusal' where each anchor is a constraint",
            ),
        ]
        for is_wrong, expected in wrong:
            if is_wrong:
                raise SPFError(f"rule '{self.name}': expected {expected}, found {self}")

    @property
    def has_subspace(self) -> bool:
        """Whether it removes a subspace."""
        return self.removal in _SUBSPACES

    @property
    def constrains(self) -> bool:
        """Whether it demands ⟨d, g_s⟩ ≤ 0 of a step."""
        published_subspace = self.level == "gradient" and self.has_subspace  # which stops at the subspace
        return self.removal in {"rank1", "left", "two-sided"} and not self.always and not published_subspace

    @property
    def promise(self) -> Promise:
        """What holds of every update that is applied, and is checked on the weights.

        ``"every block"``: ⟨Δθ, g_s⟩ ≤ 0 for each block; ``"every anchor"``: for each constraint, summed over the
        blocks; ``"subspace"``: the weights do not move inside the subspace at all.
        """
        if self.level == "gradient" or not (self.constrains or self.always):
            return "nothing"
        if self.always:
            return "subspace"
        return "every block" if self.scope == "block" else "every anchor"

    @property
    def guarantees(self) -> bool:
        """Whether anything is promised of the update that is applied."""
        return self.promise != "nothing"


_BLOCK_PROMISE = "⟨Δθ, g_s⟩ ≤ 0 for every block and step"
_LEFT_PROMISE = _BLOCK_PROMISE + "; UᵀΔθ = 0 where it conflicted, but for drift"
_TESTS = "tests/spf/test_rules.py::"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                "rank1",
                "update",
                "block",
                "rank1",
                "own",
                "the demonstration code's projection, on the update",
                formula="Δ − g_s ⟨Δ, g_s⟩₊ / ‖g_s‖²",
                guarantee=_BLOCK_PROMISE,
                test=_TESTS + "test_rank1_values",
                drift_correction=True,
            ),
            Rule(
                "left",
                "update",
                "block",
                "left",
                "own",
                "the paper's subspace, on the update; where the rest of g_s conflicts, that too",
                formula="(I − UUᵀ) Δ, then rank1 with (I − UUᵀ) g_s",
                guarantee=_LEFT_PROMISE,
                test=_TESTS + "test_left_values",
                rank=10,
                drift_correction=True,
            ),
            Rule(
                "mixed-left",
                "update",
                "block",
                "left",
                "own",
                "mixing, and left on the update that the optimizer makes of it; what wins in the experiments",
                formula="mixing, then left with k = 1",
                guarantee=_LEFT_PROMISE,
                test=_TESTS + "test_mixed_left_values",
                rank=1,
                adds=1.0,
                drift_correction=True,
                drift_margin=0.01,
            ),
            Rule(
                "two-sided",
                "update",
                "block",
                "two-sided",
                "own",
                "the subspaces of both sides, on the update",
                formula="(I − UUᵀ) Δ (I − VVᵀ), then rank1 with (I − UUᵀ) g_s (I − VVᵀ)",
                guarantee=_BLOCK_PROMISE + "; UᵀΔθ = 0, ΔθV = 0 where it conflicted, but for drift",
                test=_TESTS + "test_two_sided_values",
                rank=10,
                drift_correction=True,
            ),
            Rule(
                "cone",
                "update",
                "global",
                "rank1",
                "own",
                "GEM's quadratic programme (arXiv 1706.08840), on the update, with the anchors as tasks",
                formula="Δ − Jᵀλ, λ = argmin over λ ≥ 0 of ‖Δ − Jᵀλ‖",
                guarantee="⟨Δθ, g_i⟩ ≤ 0 for every anchor i of the step",
                test=_TESTS + "test_cone_values",
                each_anchor=True,
                drift_correction=True,
            ),
            Rule(
                "null-space",
                "update",
                "block",
                "left",
                "own",
                "Adam-NSCL's projection of updates (arXiv 2103.07113), with g_s before training for its features",
                formula="W ← W − U (UᵀW − UᵀW₀), U before training",
                guarantee="UᵀW = UᵀW₀ of every matrix, after every step",
                test=_TESTS + "test_null_space_values",
                rank=10,
                always=True,
            ),
            Rule(
                "paper",
                "gradient",
                "global",
                "left",
                "replicated",
                "arXiv 2601.10141, Algorithm 1, as replicated (there with one fixed anchor)",
                formula="(I − UUᵀ) g_u",
                test=_TESTS + "test_paper_values",
                rank=20,
            ),
            Rule(
                "demo",
                "gradient",
                "block",
                "rank1",
                "published code",
                "the paper's public demonstration code",
                formula="g_u − g_s ⟨g_u, g_s⟩₋ / ‖g_s‖²",
                test=_TESTS + "test_demo_values",
            ),
            Rule(
                "safegrad",
                "gradient",
                "global",
                "rank1",
                "from its formula",
                "SafeGrad (arXiv 2508.07172), with ρ = 1 and KL(before ‖ now) on the anchors",
                formula="g_u − g_a ⟨g_u, g_a⟩₋ / ‖g_a‖² + ρ g_a",
                test=_TESTS + "test_safegrad_values",
                adds=1.0,
                loss="kl",
            ),
            Rule(
                "mixing",
                "gradient",
                "block",
                "nothing",
                "baseline",
                "the safety loss added to the task's",
                formula="g_u + g_s",
                test=_TESTS + "test_mixing_values",
                adds=1.0,
            ),
            Rule(
                "random",
                "update",
                "block",
                "random",
                "control",
                "a random subspace, where left would remove its own",
                formula="(I − RRᵀ) Δ, R random",
                test=_TESTS + "test_random_values",
                rank=10,
            ),
            Rule(
                "norm-matched",
                "update",
                "block",
                "norm-matched",
                "control",
                "a random direction, as much as rank1 would remove",
                formula="Δ − E ⟨Δ, g_s⟩₊ / ‖g_s‖, ‖E‖ = 1 random",
                test=_TESTS + "test_norm_matched_values",
            ),
            Rule(
                "measure",
                "gradient",
                "block",
                "nothing",
                "control",
                "a plain fine-tune, only measured",
                formula="g_u",
                test=_TESTS + "test_measure_values",
            ),
        )
    }
)
"""Every rule by name; :func:`get_rule` looks one up."""

DEFAULT_RULE = "mixed-left"
"""The rule of an :class:`geomkit.SPF` that names none: what came out best in the experiments of the README."""


def rules() -> "pd.DataFrame":
    """Return a row per rule: ``rule``, ``badge``, ``source``, ``formula``, ``guarantee`` and the ``test`` that pins it.

    Example:
        >>> rules().set_index("rule").loc["demo", "formula"]
        'g_u − g_s ⟨g_u, g_s⟩₋ / ‖g_s‖²'
    """
    import pandas as pd

    columns = ("name", "level", "badge", "formula", "guarantee", "source", "test")
    rows = [{column: getattr(rule, column) for column in columns} for rule in RULES.values()]
    return pd.DataFrame(rows).rename(columns={"name": "rule"})


def get_rule(
    rule: str | Rule,
    rank: int | None = None,
    *,
    drift_correction: bool | None = None,
    drift_margin: float | None = None,
    mix: float | None = None,
) -> Rule:
    """Look a rule up by name, and change what is given: its rank, its drift correction, how much of g_s it adds.

    Raises:
        SPFError: If no rule has that name, it has no rank to change, or a number is not finite or below 0.

    Example:
        >>> get_rule("left", rank=5).rank
        5
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise SPFError(f"expected one of the rules {', '.join(RULES)}, found '{rule}'")
        rule = RULES[rule]
    if drift_correction is not None:
        rule = replace(rule, drift_correction=drift_correction)
    if drift_margin is not None:
        rule = replace(rule, drift_margin=_at_least_zero("drift_margin", drift_margin))
    if mix is not None:
        rule = replace(rule, adds=_at_least_zero("mix", mix))
    if rank is None:
        return rule
    if not rule.has_subspace or rank < 1:
        raise SPFError(
            f"expected a positive rank for a rule that removes a subspace, found rank={rank} for '{rule.name}'"
        )
    return replace(rule, rank=rank)


def _at_least_zero(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise SPFError(f"expected a finite number of at least 0, found {name}={value}")
    return float(value)
