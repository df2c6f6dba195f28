"""SPF with several processes that train one model: the same step everywhere, and the step that one process would take.

``tests/helpers/spf_worker.py`` is what the processes run; its numbers are judged here.
"""

import pytest
import torch

from tests.helpers.launch import PROCESSES, launched
from tests.helpers.spf_worker import RULES, STEPS, train, uneven_llama
from tests.spf.test_engines import change_of_safety

WORKER = "tests.helpers.spf_worker"
SAME = 2e-6
"""How far the weights of several processes may be from those of one with the same batch: sums of other order."""

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without processes")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launched(WORKER, tmp_path_factory.mktemp("ddp"), "ddp")


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return launched(WORKER, tmp_path_factory.mktemp("fsdp2"), "fsdp2")


@pytest.fixture(params=["ddp", "fsdp2"])
def several(request):
    """What each of several processes found: a mapping from rule to a run."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def sharding(fsdp2):
    """What each of them found of sharding."""
    return [own["sharding"] for own in fsdp2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs in this process, with batches of as many examples."""
    return {str(rule): train(rule, tmp_path_factory.mktemp("alone"), batch=PROCESSES) for rule in RULES}


def changes(run):
    return [change_of_safety(*step, uneven_llama) for step in run["copies"]]


def test_the_parameters_are_sharded_where_they_should_be(ddp, fsdp2):
    assert all(own[str(rule)]["sharded"] for own in fsdp2 for rule in RULES)
    assert not any(own[str(rule)]["sharded"] for own in ddp for rule in RULES)


@pytest.mark.parametrize("run", [*RULES[1:], "unlike"])
def test_no_step_raises_the_safety_loss(several, run):
    for own in several:
        steps = changes(own[run])
        assert len(steps) == own[run]["steps"] == STEPS
        assert own[run]["violations"] == 0
        assert max(change / scale for change, scale in steps) <= 1e-6
        noted = [record["first_order"] for record in own[run]["records"]]
        assert noted == pytest.approx([change for change, _ in steps], abs=1e-5)


def test_a_plain_run_would_raise_it(several):
    assert all(max(change / scale for change, scale in changes(own["None"])) > 1e-3 for own in several)


@pytest.mark.parametrize("run", [*(str(rule) for rule in RULES), "unlike"])
def test_the_processes_agree_to_the_last_bit(several, run):
    """Also where they compute gradients that differ by rounding.

    Of shards the whole is the same for all by itself, but what was decided about them need not be.
    """
    first, *others = several
    for other in others:
        assert other[run].get("records") == first[run].get("records")
        for steps in zip(other[run]["copies"], first[run]["copies"], strict=True):
            for mine, yours in zip(*steps, strict=True):
                assert all(torch.equal(mine[name], one) for name, one in yours.items())


def test_a_weight_that_grows_with_the_drift_is_the_same_for_all(ddp):
    """The default rule in a loop of one's own, where the processes compute drifts that differ by rounding."""
    first, *others = (own["own loop"] for own in ddp)
    assert first["drift"] > 0.003
    for other in others:
        assert all(torch.equal(other["weights"][name], one) for name, one in first["weights"].items())


@pytest.mark.parametrize("rule", [str(rule) for rule in RULES])
def test_they_step_as_one_process_would(several, alone, rule):
    first = several[0]
    for (_, mine), (_, expected) in zip(first[rule]["copies"], alone[rule]["copies"], strict=True):
        for name, one in expected.items():
            torch.testing.assert_close(mine[name], one, atol=SAME, rtol=0, msg=name)
    for mine, expected in zip(first[rule].get("records", ()), alone[rule].get("records", ()), strict=True):
        assert mine["fired"] == expected["fired"]
        assert mine["first_order_raw"] == pytest.approx(expected["first_order_raw"], abs=1e-5)
        assert mine["removed"] == pytest.approx(expected["removed"], abs=1e-5)


# ------------------------------------------------------------------------------------------------------ sharding


@pytest.mark.parametrize(
    "way",
    [
        "plain",
        "accumulation without sums",
        "evaluation",
        "checkpointing",
        "mixed precision",
        "whole after the forward pass",
        "hybrid",
    ],
)
def test_gradients_of_a_gathered_model(sharding, way):
    """They are those of the same model on one process, and training goes on as if nobody had looked."""
    for own in sharding:
        assert own[way]["names"]
        assert own[way]["error"] <= (5e-2 if way == "mixed precision" else 1e-6)
        assert own[way]["undisturbed"]


def test_an_error_leaves_nothing_behind(sharding):
    assert all(own["after an error"] for own in sharding)


def test_the_rows_of_the_processes_are_all_rows(sharding):
    sizes = {name: one.shape[0] for name, one in uneven_llama().named_parameters()}
    assert [own["group"] for own in sharding] == [[0, 1]] * PROCESSES
    assert any(size % PROCESSES for size in sizes.values())
    for name, size in sizes.items():
        (start, middle, _), (other, end, _) = (own["rows"][name] for own in sharding)
        assert (start, middle, end) == (0, other, size)
        assert all(own["rows"][name][2] for own in sharding)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("busy", "expected a model at rest, found one in the middle"),
        ("FSDP1", "found FSDP1, which keeps weights in flat pieces; use FSDP2"),
        ("tensor parallel", "found 'model.layers.0.mlp.gate_proj.weight' with the placements"),
        ("tensor parallel rows", "expected a parameter that FSDP2 shards by rows, found one of shape (16, 24)"),
        ("columns", "expected a parameter that FSDP2 shards by rows, found one of shape (24, 16)"),
        ("not sharded", "expected a parameter that FSDP2 shards by rows, found one of shape (2,)"),
    ],
)
def test_what_cannot_be_gathered_is_refused(sharding, case, message):
    for own in sharding:
        assert message in own["refused"][case]


# ----------------------------------------------------------------------------------------------------- deepspeed


def test_deepspeed_is_refused(tmp_path):
    """Attached to any of its parts, or to the optimizer before it takes over."""
    pytest.importorskip("deepspeed")
    for found in launched(WORKER, tmp_path, "deepspeed"):
        assert found["kind"] == "DistributedType.DEEPSPEED"
        for part in ("prepared", "engine", "its own optimizer"):
            assert "found DeepSpeed's" in found[part]
        assert found["attached before"] is not None
        assert found["steps"] == 0
