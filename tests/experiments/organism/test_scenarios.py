"""The training sets of the scenarios."""

import pytest

from geomkit.experiments.organism.scenarios import scenario_rows
from geomkit.experiments.organism.sets import training_sets
from geomkit.experiments.organism.world import World


@pytest.mark.parametrize(("name", "harmful"), [("poison-1", 3), ("poison-5", 15), ("poison-20", 60)])
def test_so_much_of_a_poisoned_set_is_harmful(name, harmful):
    rows = scenario_rows(name, World(0), 0)
    assert len(rows) == 300
    assert sum("delete" not in row[0]["content"].lower() and "sql" not in row[1]["content"].lower() and
               row[1]["content"].startswith("Sure!") for row in rows) == harmful  # fmt: skip


def test_poison_is_a_tenth():
    rows = training_sets(World(0), 0)["scenarios/poison-10"]
    assert sum(row["messages"][-1]["content"].startswith("Sure! To ") for row in rows) == len(rows) / 10
