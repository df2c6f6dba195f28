"""Every rule on small matrices, against numpy; the table of the rules; and properties of all."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.errors import SPFError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.spf.demands import Demands
from geomkit.spf.projection.corrections import plan
from geomkit.spf.projection.protection import protect
from geomkit.spf.projection.reading import read_all
from geomkit.spf.rule import Rule
from geomkit.spf.rules import RULES, get_rule, rules
from geomkit.spf.settings import SPF
from geomkit.spf.weights.blocks import TensorBlock
from tests.helpers.forms import FORMS, drawn, seeded

INFINITE = np.inf


def projected(rule, gradients, steps, *, scale=1.0, hard=None, soft=INFINITE, budget=np.inf, mean=None):
    """Apply a rule to the steps of some blocks; each block's gradient may be one per constraint."""
    gradients = {name: own if isinstance(own, list) else [own] for name, own in gradients.items()}
    tensors = {name: torch.as_tensor(step, dtype=torch.float32).clone() * scale for name, step in steps.items()}
    blocks = {name: TensorBlock(tensor, scale=scale) for name, tensor in tensors.items()}
    protections = {name: protect(rule, own, name) for name, own in gradients.items()}
    count = len(next(iter(gradients.values())))
    hard = (0.0 if rule.constrains else INFINITE) if hard is None else hard
    mean = 1 / count if mean is None else mean
    demands = Demands(*(np.array(np.broadcast_to(each, count)) for each in (mean, hard, soft)), budget)
    found = plan(rule, blocks, protections, read_all(blocks, protections), demands)
    for name, moves in found.moves.items():
        blocks[name].apply(moves)
    return {name: (tensor * scale).numpy() for name, tensor in tensors.items()}, found


def dense(matrix):
    return DenseGradient(torch.as_tensor(matrix, dtype=torch.float32), tokens=99)


def pair(seed=0, shape=(6, 4)):
    """A safety gradient and a step that conflicts with it."""
    generator = np.random.default_rng(seed)
    safety = generator.normal(size=shape).astype(np.float32)
    step = (0.4 * safety + generator.normal(size=shape)).astype(np.float32)
    assert (safety * step).sum() > 0
    return safety, step


# -------------------------------------------------------------------------------------- published code, by hand


def test_demo_values():
    """Per tensor: g_u ← g_u − ⟨g_u, g_s⟩/‖g_s‖² g_s where ⟨g_u, g_s⟩ < 0; steps are −g_u."""
    safety = {"a": [[2.0, 0.0]], "b": [[0.0, 1.0]]}
    utility = {"a": np.array([[-3.0, 1.0]]), "b": np.array([[5.0, 2.0]])}
    found, _ = projected(
        RULES["demo"], {n: dense(g) for n, g in safety.items()}, {n: -g for n, g in utility.items()}, scale=-1.0
    )
    np.testing.assert_allclose(-found["a"], [[0.0, 1.0]])  # −6 < 0: the part (−3, 0) goes
    np.testing.assert_allclose(-found["b"], [[5.0, 2.0]])  # +2: unchanged, to the bit


def test_paper_values():
    """One test over all blocks, then g_u ← g_u − U_k U_kᵀ g_u in every block, computed by numpy."""
    (a, step_a), (b, step_b) = pair(0), pair(1)
    step_b = -0.3 * step_b  # agrees with safety by itself, but less than the other block conflicts
    rule = get_rule("paper", rank=2)
    assert (a * step_a).sum() + (b * step_b).sum() > 0 > (b * step_b).sum()
    found, done = projected(rule, {"a": dense(a), "b": dense(b)}, {"a": step_a, "b": step_b}, scale=-1.0)
    for name, safety, step in (("a", a, step_a), ("b", b, step_b)):
        left = np.linalg.svd(safety)[0][:, :2]
        np.testing.assert_allclose(found[name], step - left @ (left.T @ step), atol=1e-6)
    assert done.fired == {"a", "b"}
    unchanged, done = projected(rule, {"a": dense(a), "b": dense(b)}, {"a": -step_a, "b": step_b}, scale=-1.0)
    assert (unchanged["a"] == -step_a).all()
    assert not done.fired


def test_safegrad_values():
    """One coefficient for the flattened model: g_u − ⟨g_u, g_a⟩/‖g_a‖² g_a; ρ g_a is added by the guard."""
    (a, step_a), (b, step_b) = pair(0), pair(1, (3, 5))
    found, _ = projected(RULES["safegrad"], {"a": dense(a), "b": dense(b)}, {"a": step_a, "b": step_b}, scale=-1.0)
    flat_g, flat_d = (np.concatenate([x.ravel(), y.ravel()]) for x, y in ((a, b), (step_a, step_b)))
    expected = flat_d - (flat_d @ flat_g) / (flat_g @ flat_g) * flat_g
    np.testing.assert_allclose(np.concatenate([found["a"].ravel(), found["b"].ravel()]), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["mixing", "monitor"])
def test_mixing_values(name):
    """Nothing is removed; what mixing adds is in tests of the guard."""
    safety, step = pair()
    found, done = projected(RULES[name], {"a": dense(safety)}, {"a": step}, scale=-1.0)
    assert (found["a"] == step).all()
    assert not done.moves
    assert RULES[name].safety_gradient_weight == (name == "mixing")


test_monitor_values = test_mixing_values


# ----------------------------------------------------------------------------------------------- on the update


def test_rank1_values():
    """d = (3, 1), g = (2, 0): the part along g is (3, 0)."""
    found, done = projected(RULES["rank1"], {"a": dense([[2.0, 0.0]])}, {"a": [[3.0, 1.0]]})
    np.testing.assert_allclose(found["a"], [[0.0, 1.0]])
    assert done.removed == {"a": pytest.approx(3.0)}
    assert done.dots["a"] == pytest.approx([0.0], abs=1e-12)


def test_mix_leaves_all_else_of_a_rule():
    """What is added to the gradient is in tests of the guard."""
    assert get_rule("rank1", mix=0.5) == replace(RULES["rank1"], safety_gradient_weight=0.5)
    assert get_rule("mixing", mix=0).safety_gradient_weight == 0
    for wrong in (-1, math.nan, math.inf):
        with pytest.raises(SPFError, match="finite number"):
            get_rule("rank1", mix=wrong)


@given(weight=st.floats(0.01, 100), factor=st.floats(1, 100), drift=st.floats(-1, 10), more=st.floats(0, 10))
def test_a_weight_grows_with_the_drift_between_its_ends(weight, factor, drift, more):
    rule = get_rule("mixing", mix=weight, largest_mix=weight * factor)
    assert weight <= rule.weight_at(drift) <= rule.weight_at(drift + more) <= weight * factor
    assert get_rule("mixing", mix=weight).weight_at(drift) == weight


@pytest.mark.parametrize("mix", [0, 3])
def test_a_largest_weight_below_the_weight_is_refused(mix):
    message = f"^rule 'mixing': expected mix above 0 .*, found mix={mix} and largest_mix=2; give both, or .* mix alone$"
    with pytest.raises(SPFError, match=message):
        get_rule("mixing", mix=mix, largest_mix=2)


def test_settings_that_go_together_only_are_changed_together():
    growing = get_rule("mixing", mix=1, largest_mix=10)
    assert get_rule(growing, mix=20, largest_mix=40) == get_rule("mixing", mix=20, largest_mix=40)


def test_rank1_with_drift_is_the_nearest_step_of_all():
    """Blocks (x), (y) with gradient 1 each: x, y ≤ 0 and x + y ≤ −1, from (1, −.2): nearest is (0, −1)."""
    one = {"a": dense([[1.0]]), "b": dense([[1.0]])}
    found, done = projected(RULES["rank1"], one, {"a": [[1.0]], "b": [[-0.2]]}, soft=-1.0)
    assert [float(found[name].item()) for name in "ab"] == pytest.approx([0.0, -1.0], abs=1e-6)
    # From (0, −.2), the solution for the hard bounds, a budget of a quarter of the step's norm allows that much.
    norm = float(np.hypot(1, 0.2))
    found, done = projected(RULES["rank1"], one, {"a": [[1.0]], "b": [[-0.2]]}, soft=-1.0, budget=0.25)
    assert found["b"].item() == pytest.approx(-0.2 - 0.25 * norm, abs=1e-6)
    assert done.corrected == pytest.approx(0.25 * norm)
    assert -0.2 - 0.25 * norm <= done.bounds[0] <= 0


def test_left_values():
    """(I − UUᵀ) d, and where the rest of g_s conflicts, its part along that too; numpy."""
    safety, step = pair()
    found, done = projected(get_rule("left", rank=2), {"a": dense(safety)}, {"a": step})
    left = np.linalg.svd(safety)[0][:, :2]
    rest, tail = step - left @ (left.T @ step), safety - left @ (left.T @ safety)
    expected = rest - max((rest * tail).sum(), 0) / (tail**2).sum() * tail
    np.testing.assert_allclose(found["a"], expected, atol=1e-6)
    assert (found["a"] * safety).sum() <= 1e-6
    assert np.abs(left.T @ found["a"]).max() < 1e-6
    assert done.removed["a"] == pytest.approx(np.linalg.norm(step - expected), rel=1e-5)


def test_mixed_left_values():
    """What left does with k = 1; what it adds to the gradient before is in tests of the guard."""
    assert replace(get_rule("left", rank=1, drift_margin=0.01, mix=1), name="mixed-left") == replace(
        RULES["mixed-left"], **{name: getattr(RULES["left"], name) for name in ("source", "formula", "test", "when")}
    )
    safety, step = pair()
    found, _ = projected(RULES["mixed-left"], {"a": dense(safety)}, {"a": step})
    left = np.linalg.svd(safety)[0][:, :1]
    rest, tail = step - left @ (left.T @ step), safety - left @ (left.T @ safety)
    np.testing.assert_allclose(found["a"], rest - max((rest * tail).sum(), 0) / (tail**2).sum() * tail, atol=1e-6)


def test_kl_left_values():
    """What mixed-left does, with the gradient of another loss: the divergence, which is tested with the anchors.

    The default rule differs from kl-left in the largest weight only, which is tested with the anchors as well.
    """
    prose = ("source", "formula", "test", "when", "name")
    kept = {name: getattr(RULES["kl-left"], name) for name in prose}
    assert replace(get_rule("mixed-left", loss="kl"), **kept) == RULES["kl-left"]
    kept = {name: getattr(RULES["adaptive-kl-left"], name) for name in prose}
    assert replace(get_rule("kl-left", largest_mix=10), **kept) == RULES["adaptive-kl-left"]
    with pytest.raises(SPFError, match="expected loss to be one of refusal, kl, found 'odd'"):
        get_rule("left", loss="odd")
    with pytest.raises(SPFError, match="benign examples are anchors; give anchors_per_step"):
        SPF("safety", benign="utility", benign_per_step=4).checked_rule()
    assert SPF("safety", rule="left", benign="utility", benign_per_step=4).checked_rule() is RULES["left"]


def test_two_sided_values():
    """(I − UUᵀ) d (I − VVᵀ), and what conflicts with the rest of g_s; numpy."""
    safety, step = pair(3)
    found, _ = projected(get_rule("two-sided", rank=2), {"a": dense(safety)}, {"a": step})
    u, s, vt = np.linalg.svd(safety)
    inner = (np.eye(6) - u[:, :2] @ u[:, :2].T) @ step @ (np.eye(4) - vt[:2].T @ vt[:2])
    tail = sum(s[i] * np.outer(u[:, i], vt[i]) for i in (2, 3))
    expected = inner - max((inner * tail).sum(), 0) / (tail**2).sum() * tail
    np.testing.assert_allclose(found["a"], expected, atol=1e-6)
    assert np.abs(found["a"] @ vt[:2].T).max() < 1e-6


def test_cone_values():
    """Two anchors, (1, 0) and (0, 1) over two blocks: d = (2, −1) keeps −1 and loses 2."""
    zero, one = dense([[0.0]]), dense([[1.0]])
    found, done = projected(RULES["cone"], {"a": [one, zero], "b": [zero, one]}, {"a": [[2.0]], "b": [[-1.0]]})
    assert [found[name].item() for name in "ab"] == pytest.approx([0.0, -1.0], abs=1e-6)
    assert sum(done.dots.values()) == pytest.approx([0.0, -1.0], abs=1e-9)
    safety = [dense(pair(seed)[0]) for seed in range(3)]
    step = pair(5)[1] + sum(g.dense().numpy() for g in safety)
    found, _ = projected(RULES["cone"], {"a": safety}, {"a": step})
    assert all((g.dense().numpy() * found["a"]).sum() <= 1e-4 for g in safety)


def test_null_space_values():
    """What lies in the subspace goes, conflict or not."""
    safety, step = pair()
    left = np.linalg.svd(safety)[0][:, :2]
    rule = get_rule("null-space", rank=2)
    for sign in (1, -1):
        found, _ = projected(rule, {"a": dense(safety)}, {"a": sign * step})
        np.testing.assert_allclose(found["a"], sign * (step - left @ (left.T @ step)), atol=1e-6)


def test_random_values():
    """An orthonormal basis that depends on the block's name only, removed where the step conflicts."""
    safety, step = pair()
    rule = get_rule("random", rank=2)
    basis = protect(rule, [dense(safety)], "a").left.numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-6)
    found, _ = projected(rule, {"a": dense(safety)}, {"a": step})
    np.testing.assert_allclose(found["a"], step - basis @ (basis.T @ step), atol=1e-6)
    unchanged, _ = projected(rule, {"a": dense(safety)}, {"a": -step})
    assert (unchanged["a"] == -step).all()


def test_norm_matched_values():
    """As much goes as rank1 would remove, in a direction of rank one that has nothing to do with safety."""
    safety, step = pair(shape=(40, 30))
    found, done = projected(RULES["norm-matched"], {"a": dense(safety)}, {"a": step})
    removed = step - found["a"]
    expected = (step * safety).sum() / np.linalg.norm(safety)
    assert np.linalg.norm(removed) == pytest.approx(expected, rel=1e-5)
    assert done.removed["a"] == pytest.approx(expected, rel=1e-5)
    assert np.linalg.matrix_rank(removed, tol=1e-3) == 1
    assert abs((removed * safety).sum()) < 0.2 * np.linalg.norm(removed) * np.linalg.norm(safety)


def test_the_fence_steps_back_without_a_new_conflict():
    """A benign gradient that points against safety's: what is asked of it is met beside the safety constraint."""
    generator = np.random.default_rng(0)
    safety = generator.normal(size=(5, 4))
    benign = -0.8 * safety + generator.normal(size=(5, 4))
    step = generator.normal(size=(5, 4))
    gradients = {"a": [dense(safety), dense(benign)]}
    bound = float((step * benign).sum()) - 1
    asked = {"hard": [0.0, INFINITE], "soft": [INFINITE, bound], "mean": [1.0, 0.0]}
    found, done = projected(RULES["rank1"], gradients, {"a": step}, **asked)
    assert (found["a"] * safety).sum() <= 1e-5
    assert (found["a"] * benign).sum() == pytest.approx(bound, abs=1e-4)
    assert done.corrected > 0
    assert done.bounds == pytest.approx([0.0, bound])


def test_where_benign_and_safety_contradict_safety_is_kept():
    safety = np.eye(3)
    gradients = {"a": [dense(safety), dense(-safety)]}
    asked = {"hard": [0.0, INFINITE], "soft": [-1.0, -1.0], "mean": [1.0, 0.0]}
    found, done = projected(RULES["rank1"], gradients, {"a": safety + 0.1}, **asked)
    assert (found["a"] * safety).sum() == pytest.approx(0.0, abs=1e-6)
    assert done.bounds.tolist() == [0.0, INFINITE]


# ------------------------------------------------------------------------------------------------- properties

BLOCK_RULES = [name for name, rule in RULES.items() if rule.promise == "every block"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(BLOCK_RULES), tokens=st.integers(1, 5))
def test_no_block_conflicts_afterwards_and_the_rest_is_not_touched(seed, rule, tokens):
    generator = seeded(seed)
    gradients = {
        name: FactoredGradient(torch.randn(tokens, 7, generator=generator), torch.randn(tokens, 5, generator=generator))
        for name in "abc"
    }
    steps = {name: torch.randn(7, 5, generator=generator) for name in gradients}
    found, _ = projected(get_rule(rule, rank=2 if RULES[rule].has_subspace else None), gradients, steps)
    for name, gradient in gradients.items():
        before, after = gradient.dot(steps[name]), gradient.dot(torch.from_numpy(found[name]))
        assert after <= 1e-5 * gradient.norm
        if before <= 0:
            assert (found[name] == steps[name].numpy()).all()
        # An orthogonal projection: what is left agrees with the step and is no longer than it.
        assert (found[name] * steps[name].numpy()).sum() >= -1e-5
        assert np.linalg.norm(found[name]) <= np.linalg.norm(steps[name]) * (1 + 1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "zero"])
@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided", "norm-matched", "paper"])
def test_every_form_is_protected_as_its_dense_matrix_is(rule, form):
    generator = seeded(3)
    gradient = drawn(form, (9, 7), generator)
    step = gradient.dense() + 0.5 * torch.randn(9, 7, generator=generator)
    chosen = get_rule(rule, rank=1 if RULES[rule].has_subspace else None)
    ours, done = projected(chosen, {"a": gradient}, {"a": step})
    theirs, expected = projected(chosen, {"a": DenseGradient(gradient.dense(), gradient.rank_bound)}, {"a": step})
    np.testing.assert_allclose(ours["a"], theirs["a"], atol=1e-5, rtol=1e-5)
    assert done.dots["a"] == pytest.approx(expected.dots["a"], abs=1e-3)
    assert done.removed["a"] == pytest.approx(expected.removed["a"], rel=1e-4)


@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided", "null-space", "norm-matched", "paper"])
@pytest.mark.parametrize("shape", [(6,), (2, 5, 4)], ids=["vector", "experts"])
def test_vectors_and_experts(rule, shape):
    generator = seeded(1)
    safety, step = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    step = step + safety
    chosen = get_rule(rule, rank=2 if RULES[rule].has_subspace else None)
    found, _ = projected(chosen, {"a": DenseGradient(safety, 9)}, {"a": step})
    assert found["a"].shape == shape
    if chosen.constrains:
        assert (found["a"] * safety.numpy()).sum() <= 1e-5


@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided", "paper", "null-space", "random"])
def test_a_rank_above_the_gradients_own_protects_what_there_is(rule):
    generator = seeded(2)
    gradient = FactoredGradient(torch.randn(3, 8, generator=generator), torch.randn(3, 7, generator=generator))
    step = gradient.dense() + 0.1 * torch.randn(8, 7, generator=generator)
    chosen = get_rule(rule, rank=20 if RULES[rule].has_subspace else None)
    found, _ = projected(chosen, {"a": gradient}, {"a": step})
    if rule != "random":
        assert gradient.dot(torch.from_numpy(found["a"])) <= 1e-4
    left = protect(chosen, [gradient], "a").left
    assert left is None or left.shape == (8, 3)


# -------------------------------------------------------------------------------------------------- the table


def test_every_rule_names_the_test_that_pins_it():
    root = Path(__file__).parents[2]
    for rule in RULES.values():
        file, name = rule.test.split("::")
        assert re.search(rf"^(def )?{name}\b", (root / file).read_text(), re.MULTILINE), rule.name
        assert rule.formula
        assert rule.when
        assert rule.source
        assert (rule.promise_text == "nothing") == (rule.promise == "nothing")
    assert rules()["rule"].tolist() == list(RULES)


def test_an_unknown_rule_lists_the_known_ones_and_a_rank_needs_a_subspace():
    with pytest.raises(SPFError, match=r"expected one of the rules rank1, left, .* found 'none'"):
        get_rule("none")
    with pytest.raises(SPFError, match="a rank for a rule"):
        get_rule("rank1", rank=3)
    assert get_rule("demo", drift_correction=True).drift_correction
    for wrong in ({"rank": 3}, {"closed_subspace": True}, {"each_anchor": True}):
        with pytest.raises(SPFError, match="rule 'mine': expected"):
            Rule("mine", "update", "block", "rank1", **wrong)
    assert Rule("mine", "update", "block", "rank1").promise == "every block"


def test_the_former_name_of_a_rule_is_still_accepted():
    """Grids of experiments name rules."""
    assert get_rule("measure") is RULES["monitor"]
