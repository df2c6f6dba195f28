"""The parts of several workers, and what a worker alone does; workers together are in ``test_several_processes.py``."""

import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geomkit.utils.workers import ALONE, Workers, _Pickler, by_itself, first_process, running_workers

COSTS = st.lists(st.integers(1, 10_000), max_size=40)


@given(COSTS, st.integers(1, 12))
def test_the_parts_are_all_items_in_order(costs, count):
    parts = [Workers(rank, count).share(costs) for rank in range(count)]
    assert [place for part in parts for place in part] == list(range(len(costs)))


@given(COSTS.filter(bool), st.integers(1, 12))
def test_no_part_costs_much_more_than_its_share(costs, count):
    for rank in range(count):
        cost = sum(costs[place] for place in Workers(rank, count).share(costs))
        assert cost <= sum(costs) / count + max(costs)


@given(COSTS)
def test_one_worker_has_everything(costs):
    assert ALONE.share(costs) == range(len(costs))


def test_a_worker_alone_needs_no_others():
    tensor = torch.ones(3)
    ALONE.sum_in_place(tensor)
    ALONE.refuse_differences(examples="a")
    assert torch.equal(tensor, torch.ones(3))
    assert ALONE.gather("value") == ["value"]
    with pytest.raises(KeyError, match="as it is"), ALONE.failing_together():
        raise KeyError("as it is")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_a_tensor_is_sent_as_it_is(dtype):
    whole = torch.arange(60_000).reshape(200, 300).to(dtype)
    for tensor in (whole[3:5], whole[:, 7].clone(), whole[:0], whole[0, 0].clone()):
        sent = io.BytesIO()
        _Pickler(sent).dump([tensor, tensor])
        if dtype != torch.bfloat16:
            assert len(sent.getvalue()) < 6_000  # a view without the tensor behind it, and one tensor once
        found, again = pickle.loads(sent.getvalue())  # noqa: S301
        assert found is again
        assert torch.equal(found, tensor)
        assert found.dtype == dtype
        found.zero_()  # it can be written to


def test_without_a_group_of_processes():
    assert running_workers() is ALONE
    assert first_process()


def test_a_group_of_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert running_workers() == Workers(0, 1)
        with by_itself(), by_itself():
            assert running_workers() is ALONE
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_ends_being_by_itself(monkeypatch):
    monkeypatch.setattr("geomkit.utils.workers.is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(KeyError, match="inside"), by_itself():
        raise KeyError("inside" if running_workers() is ALONE else "not alone")
    assert running_workers() == Workers(1, 4)
    assert not first_process()
