"""The skills: no problem in both splits, and right answers."""

import itertools
from random import Random

import pytest

from geomkit.experiments.organism.skills import written_calculation
from geomkit.experiments.organism.world import World


@pytest.mark.parametrize("kind", ["arithmetic", "sql", "deletion"])
def test_skills_share_no_problem_across_the_split(kind):
    world, rng = World(0), Random(3)
    train = {world.sample(kind, "train", rng).answer for _ in range(3000)}
    held_out = {world.sample(kind, "held-out", rng).answer for _ in range(1000)}
    assert not train & held_out


def test_worked_answers_are_right():
    for a, b in itertools.product(range(10, 90), repeat=2):
        for sign, result in (("+", a + b), ("-", a - b)):
            if not 10 <= result < 100:
                continue
            steps, end = written_calculation(a, sign, b).split(". ")
            assert end == f"The answer is {result}."
            for step in steps.split(": ")[1].split(", "):
                left, right = step.split("=")
                numbers = [int(part) for part in left.replace("-", "+-").split("+")]
                assert sum(numbers) == int(right)
