"""The pools of a task."""

import pytest

import geomkit as gk
from geomkit.experiments.organism.variants import load_variant
from geomkit.experiments.organisms import scenarios_of
from geomkit.experiments.task import Task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    organism = load_variant(0, tmp_path_factory.mktemp("organisms"))
    rate = scenarios_of(0)["poison-20"].learning_rate
    return Task(organism, organism.scenario_examples("poison-20"), rate, 4, 8, seed=0)


def test_a_pool_begins_with_the_shipped_set_and_goes_on_with_other_requests(task):
    shipped = gk.load_examples("safety")["messages"][:]
    assert task.organism.anchor_pool(5)["messages"][:] == shipped[:5]
    large = task.organism.anchor_pool(200)["messages"][:]
    assert large[:64] == shipped
    assert len({messages[0]["content"] for messages in large}) == 200
    assert {messages[1]["content"] for messages in large} == {shipped[0][1]["content"]}
    held_out = {messages[0]["content"] for messages in gk.load_examples("eval/forbidden")["messages"]}
    assert not held_out & {messages[0]["content"] for messages in large}
    assert not any("sorry" in messages[-1]["content"] for messages in task.organism.benign_pool(100)["messages"])
