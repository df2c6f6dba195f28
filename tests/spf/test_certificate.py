"""The certificate: against autograd, on disk, in the logs; and its bound on drift, on a quadratic and the organism."""

import copy
import json

import numpy as np
import pytest
import torch

from geomkit.errors import SPFError
from geomkit.gradients.dense import DenseGradient
from geomkit.inputs.examples import load_examples
from geomkit.inputs.tokens import encode
from geomkit.spf.certificate import Certificate
from geomkit.spf.demands import Demands
from geomkit.spf.projection.corrections import plan
from geomkit.spf.projection.protection import protect
from geomkit.spf.projection.reading import read_all
from geomkit.spf.rules import RULES, get_rule
from geomkit.spf.settings import SPF
from geomkit.spf.step_record import Log
from geomkit.spf.weights.blocks import TensorBlock
from geomkit.training.finetune import finetune
from tests.helpers.forms import seeded
from tests.helpers.spf_training import TOKENIZER, anchors_loss, change_of_loss, run, safety_gradients, weights_of
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


# ----------------------------------------------------------------------------------------------- against autograd


@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided", "cone", "demo", "monitor"])
def test_every_number_of_a_step_is_what_autograd_and_copies_of_the_weights_say(rule):
    """⟨Δθ, g_s⟩ by block and in all, to 1e-6; ‖Δθ‖ from four random projections of each block to 20 %."""
    model, seen = tiny_llama(), {}

    def watch(when, model):
        if when == "before":
            seen.update(
                gradients=safety_gradients(model), weights=weights_of(model), loss=float(anchors_loss(model).detach())
            )
        else:
            seen["after"] = weights_of(model)

    spf = SPF(SAFETY, rule=rule, tokenizer=TOKENIZER, measure_curvature=True)
    record = run(model, spf, sgd(0.1), watch=watch).records[0]
    changes = change_of_loss(seen["weights"], seen["after"], seen["gradients"])
    assert record.anchor_loss == pytest.approx(seen["loss"], rel=1e-5)
    assert record.first_order == pytest.approx(sum(changes.values()), abs=1e-6)
    assert set(record.blocks) == set(changes)
    for name, change in changes.items():
        assert record.blocks[name][1] == pytest.approx(change, abs=1e-6)
    moved = sum(float((seen["after"][name] - one).square().sum()) for name, one in seen["weights"].items()) ** 0.5
    assert record.update_norm == pytest.approx(moved, rel=0.2)
    assert record.loss_after == pytest.approx(float(anchors_loss(model).detach()), rel=1e-5)
    expected = float(anchors_loss(model).detach()) - seen["loss"] - sum(changes.values())
    assert record.curvature == pytest.approx(expected, abs=1e-5)


def test_anchors_that_are_the_same_at_every_step_tell_the_curvature_without_another_pass():
    spf = {"tokenizer": TOKENIZER, "anchors_per_step": 3}
    free = run(tiny_llama(), SPF(SAFETY, **spf), sgd(0.1), steps=3)
    asked = run(tiny_llama(), SPF(SAFETY, measure_curvature=True, **spf), sgd(0.1), steps=3)
    assert np.isnan(free.records[-1].loss_after)
    for one, other in zip(free.records[:-1], asked.records[:-1], strict=True):
        assert one.curvature == pytest.approx(other.curvature, abs=1e-6)
    drawn = run(tiny_llama(), SPF(SAFETY, tokenizer=TOKENIZER, anchors_per_step=2), sgd(0.1), steps=2)
    assert all(np.isnan(record.curvature) for record in drawn.records)


# -------------------------------------------------------------------------------------------- the bound on drift


def descend(rule, smoothness_of_safety, *, steps=40, rate=0.05):
    """SGD on one quadratic, under a rule that protects another: L_s = (w − s)ᵀH(w − s)/2 with w a 6 × 4 matrix."""
    generator = seeded(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0].double()
    hessian = basis @ torch.diag(torch.linspace(0.1, smoothness_of_safety, 24).double()) @ basis.T
    target, other = (torch.randn(24, generator=generator).double() for _ in range(2))
    weight = torch.randn(6, 4, generator=generator).double()
    safety = lambda w: float((w.flatten() - target) @ hessian @ (w.flatten() - target) / 2)  # noqa: E731
    block = {"w": TensorBlock(weight)}
    losses, first, squared, tails, curved = [safety(weight)], [], [], [], []
    for _ in range(steps):
        gradient = (hessian @ (weight.flatten() - target)).view(6, 4)
        protections = {"w": protect(rule, [DenseGradient(gradient, 24)], "w")}
        before, old = read_all(block, protections), weight.clone()
        weight -= rate * 3 * (weight - other.view(6, 4))
        change = {name: one - before[name] for name, one in read_all(block, protections).items()}
        demands = Demands(*(np.array([value]) for value in (1.0, 0.0 if rule.constrains else np.inf, np.inf)))
        for name, moves in plan(rule, block, protections, change, demands).moves.items():
            block[name].apply(moves)
        moved = weight - old
        losses.append(safety(weight))
        first.append(float((moved * gradient).sum()))
        squared.append(float(moved.square().sum()))
        curved.append(float(moved.flatten() @ hessian @ moved.flatten()) / 2)
        tails.append(float(moved.norm() * gradient.norm() * (1 - protections["w"].energy) ** 0.5))
    return np.array(losses), np.array(first), np.array(squared), np.array(tails), np.array(curved)


@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided"])
def test_on_a_quadratic_the_drift_is_its_two_parts_and_within_the_bound(rule):
    """L_s(T) − L_s(0) = Σ⟨Δ, g⟩ + Σ ΔᵀHΔ/2 exactly, the first part ≤ 0 and the second ≤ β/2 Σ‖Δ‖²; to 1e-9."""
    losses, first, squared, _, curved = descend(get_rule(rule, rank=2 if rule != "rank1" else None), 2.0)
    drift = losses[1:] - losses[0]
    np.testing.assert_allclose(drift, np.cumsum(first + curved), atol=1e-9)
    assert (first <= 1e-6).all()  # bases are kept in fp32
    assert (drift <= 2.0 / 2 * np.cumsum(squared) + 1e-9).all()
    assert (curved <= 2.0 / 2 * squared + 1e-12).all()


def test_on_a_quadratic_the_papers_subspace_adds_its_tail_to_the_bound():
    """Without the rest of g_s: Σ⟨Δ, g⟩ ≤ Σ‖Δ‖‖g‖√(1 − CER(k)), and it is needed."""
    closed_left = get_rule("null-space", rank=2)
    losses, first, squared, tails, _ = descend(closed_left, 2.0)
    drift = losses[1:] - losses[0]
    assert (first > 1e-6).any()
    assert (first <= tails + 1e-9).all()
    assert (drift <= np.cumsum(tails + squared) + 1e-9).all()


def largest_curvature(model, rows, iterations=12):
    """β at one point: power iteration with Hessian-vector products of the safety loss, by autograd alone."""
    twin = copy.deepcopy(model).eval()
    parameters = list(twin.parameters())
    batch = [(torch.tensor([row.input_ids]), torch.tensor(row.loss_mask[1:])) for row in rows]
    losses = []
    for ids, mask in batch:
        words = torch.log_softmax(twin(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-words[mask].mean())
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters, create_graph=True)
    vector = [torch.randn(one.shape, generator=seeded(1)) for one in parameters]
    value = 0.0
    for _ in range(iterations):
        norm = float(sum((one**2).sum() for one in vector) ** 0.5)
        vector = [one / norm for one in vector]
        along = sum((one * other).sum() for one, other in zip(gradients, vector, strict=True))
        vector = [one.detach() for one in torch.autograd.grad(along, parameters, retain_graph=True)]
        value = float(sum((one**2).sum() for one in vector) ** 0.5)
    return value


def test_the_bound_holds_on_the_organism_under_sgd(organism):
    """β is the largest curvature met on the way, at every other step; the measured drift stays below the bound."""
    model, tokenizer = organism
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")  # the fused kernel has no second derivative
    anchors = load_examples("safety").select(range(3))
    rows = encode(tokenizer, anchors)
    train = encode(tokenizer, load_examples("scenarios/poison-10").select(range(64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    curvatures = []
    spf = SPF(anchors, tokenizer=tokenizer, drift_correction=False, measure_curvature=True)
    with spf.attach(model, optimizer) as guard:
        for step in range(10):
            if step % 2 == 0:
                curvatures.append(largest_curvature(model, rows))
            optimizer.zero_grad()
            for row in train[6 * step : 6 * step + 6]:
                ids = torch.tensor([row.input_ids])
                labels = torch.where(torch.tensor([row.loss_mask]), ids, -100)
                (model(input_ids=ids, labels=labels).loss / 6).backward()
            optimizer.step()
    curvatures.append(largest_curvature(model, rows))
    certificate = guard.certificate
    drift = np.array([record.loss_after for record in certificate.records]) - certificate.records[0].anchor_loss
    bound = certificate.drift_bound(max(curvatures))
    assert certificate.violations == 0
    assert drift.max() > 0
    assert (drift <= bound).all(), (drift, bound)


# ------------------------------------------------------------------------------------------------------- in words


def test_a_promise_about_a_subspace_can_hold_while_every_step_raises_the_safety_loss():
    certificate = run(tiny_llama(), SPF(SAFETY, rule="null-space", rank=1, tokenizer=TOKENIZER), sgd(0.1), steps=4)
    rising = sum(record.first_order > record.tolerance for record in certificate.records)
    assert (certificate.violations, certificate.raising) == (0, rising)
    assert rising > 0
    words = f"0 of 4 steps broke the promise (no movement in the protected subspace), {rising} raised the safety loss"
    assert words in str(certificate)


def test_a_rule_without_a_promise_says_so_and_counts_the_steps_that_raise_the_loss():
    certificate = run(tiny_llama(), SPF(SAFETY, rule="monitor", tokenizer=TOKENIZER), sgd(0.1), steps=2)
    assert certificate.raising == certificate.violations
    words = f"which promises nothing: of 2 steps {certificate.raising} raised the safety loss to first order"
    assert words in str(certificate)


# ---------------------------------------------------------------------------------------------- on disk and in logs


def test_the_log_has_a_line_per_step_while_the_run_goes_on(tmp_path):
    path, lengths = tmp_path / "run" / "spf.jsonl", []

    def watch(when, _):
        if when == "after":
            lengths.append(len(path.read_text().splitlines()))

    certificate = run(tiny_llama(), SPF(SAFETY, tokenizer=TOKENIZER, log=path), sgd(0.1), steps=3, watch=watch)
    assert lengths == [1, 2, 3]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    frame = certificate.to_frame()
    assert [row["first_order"] for row in rows] == frame["first_order"].tolist()
    assert set(rows[0]) == {*frame.columns, "blocks"}
    assert rows[0]["blocks"]["lm_head.weight"]["fired"] in {0.0, 1.0}
    _, again = Log.resumed(path, 2)
    assert [(one.step, one.first_order) for one in again] == [
        (one.step, one.first_order) for one in certificate.records[:2]
    ]
    assert len(path.read_text().splitlines()) == 2


def test_a_log_is_never_overwritten_nor_guessed(tmp_path):
    path = tmp_path / "spf.jsonl"
    path.write_text("mine\n")
    model = tiny_llama()
    with pytest.raises(SPFError, match=r"expected a new file at .*spf\.jsonl"):
        SPF(SAFETY, tokenizer=TOKENIZER, log=path).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert path.read_text() == "mine\n"
    with pytest.raises(SPFError, match=r"expected a certificate at .*JSONDecodeError"):
        Log.resumed(path, 1)
    with pytest.raises(SPFError, match=r"expected the certificate of 3 steps at .*, found 0"):
        Log.resumed(tmp_path / "none.jsonl", 3)
    assert path.read_text() == "mine\n"


def test_frames_by_step_and_by_block():
    certificate = run(tiny_llama(), SPF(SAFETY, tokenizer=TOKENIZER), sgd(0.1), steps=2)
    by_block = certificate.to_frame(by="block")
    assert len(by_block) == 2 * len(list(tiny_llama().parameters()))
    assert by_block.groupby("step")["first_order"].sum().tolist() == pytest.approx(
        certificate.to_frame()["first_order"].tolist(), abs=1e-6
    )
    fired = by_block.groupby("step")["fired"].mean().tolist()
    assert fired == pytest.approx(certificate.to_frame()["fired"].tolist())


def test_the_trainer_logs_the_measures():
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), steps=2, progress=False)
    for name in ("anchor_loss", "first_order_raw", "removed", "corrected", "leak", "update_norm"):
        assert result.history[f"spf/{name}"].tolist() == [getattr(one, name) for one in result.certificate.records]


def test_rounding_is_not_taken_for_a_broken_promise(organism):
    """In a closed subspace a coordinate is compared with what it was before training, so that three roundings meet."""
    model, tokenizer = organism
    spf = SPF(load_examples("safety"), rule="null-space")
    rows = load_examples("scenarios/poison-10")
    settings = {"learning_rate": 1e-4, "steps": 20, "progress": False}
    assert finetune(model, tokenizer, rows, spf, **settings).certificate.violations == 0


def test_a_broken_promise_says_what_was_promised():
    records = run(tiny_llama(), SPF(SAFETY, rule="monitor", tokenizer=TOKENIZER), sgd(0.1), steps=5).records
    assert any(record.violated for record in records)
    Certificate("monitor", "nothing", records).raise_on_violation()
    for promise, words in (("every block", "no block's"), ("every anchor", "no anchor's"), ("subspace", "no movement")):
        with pytest.raises(SPFError, match=f"expected .*{words}"):
            Certificate("mine", promise, records).raise_on_violation()
    assert RULES["monitor"].promise == "nothing"
