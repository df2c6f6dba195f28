"""Changes of the utility gradients before a step: their projection, and the addition of the safety gradient."""

from geomkit.errors import SPFError
from geomkit.spf.demands import Measured
from geomkit.spf.projection.corrections import Plan, plan
from geomkit.spf.protected import ProtectedBlocks
from geomkit.spf.rule import Rule
from geomkit.spf.weights.blocks import Block
from geomkit.spf.weights.guarded import Guarded


def project_gradients(
    rule: Rule, guarded: Guarded, protected: ProtectedBlocks, measured: Measured, seed: int
) -> Plan | None:
    """Project the utility gradients g_u in place, as the step −g_u, and return the corrections.

    Args:
        rule: A rule on the gradient.
        guarded: The weights with their gradients.
        protected: The protections of the weights.
        measured: The constraints.
        seed: Seed of random directions.

    Returns:
        The corrections; ``None`` for a rule that removes no part of a gradient.

    Raises:
        SPFError: If there are no gradients.
    """
    protections = protected.protections
    steps: dict[str, Block] = {
        name: block for name in protections if (block := guarded.gradient_block(name)) is not None
    }
    if protections and not steps:
        raise _no_gradients(rule)
    if not rule.projects_gradient:
        return None
    changes = protected.read(steps, blocks=steps)
    corrections = plan(rule, steps, protections, changes, measured.demands.only_hard(), seed)
    for name, moves in corrections.moves.items():
        steps[name].apply(moves)
    return corrections


def refuse_missing_gradients(rule: Rule, guarded: Guarded) -> None:
    """Check that there are utility gradients to which a rule can add.

    Raises:
        SPFError: If no parameter has a gradient.
    """
    if all(parameter.grad is None for parameter in guarded.parameters.values()):
        raise _no_gradients(rule)


def refuse_closure(rule: Rule) -> None:
    """Check that a step without closure suits a rule; with a closure gradients are computed anew within the step.

    Raises:
        SPFError: If the rule changes the gradients, which the closure would overwrite.
    """
    if rule.projects_gradient or rule.safety_gradient_weight:
        raise SPFError(
            f"expected optimizer.step() without a closure for the rule '{rule.name}', which changes the gradients "
            "before the step, found a closure, which computes them anew; call backward() before step(), or take a rule "
            "that leaves the gradients alone, such as 'rank1'"
        )


def add_safety_gradient(rule: Rule, guarded: Guarded, measured: Measured) -> None:
    """Add the mean safety gradient Σ w_i g_i, times the rule's weight at the present drift, to the utility gradients.

    Args:
        rule: A rule with a ``safety_gradient_weight``.
        guarded: The weights with their gradients.
        measured: The constraints.
    """
    # A fused optimizer divides all gradients by its ``grad_scale``.
    weights, scale = measured.demands.safety_weights, getattr(guarded.optimizer, "grad_scale", None)
    factor = rule.weight_at(measured.drift) * (1.0 if scale is None else float(scale))
    for name, gradients in measured.gradients.items():
        pairs = zip(gradients, weights, strict=True)
        guarded.add_to_gradients(name, [(gradient, factor * float(weight)) for gradient, weight in pairs if weight])


def _no_gradients(rule: Rule) -> SPFError:
    return SPFError(
        f"expected gradients before optimizer.step() for the rule '{rule.name}', found none; call backward() "
        "first, and give step() no closure"
    )
