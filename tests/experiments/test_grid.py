"""What a grid file says, and what it must not."""

import pytest

import geomkit as gk
from geomkit.errors import DataError
from geomkit.experiments.grid import load_grid
from geomkit.experiments.organism.scenarios import SCENARIOS
from geomkit.experiments.organisms import scenarios_of

SMALL = """
name = "small"
prompts = 30

[arms]
SFT = { method = "sft" }
rank1 = { anchors = 8 }

[[block]]
scenarios = ["poison-10", "harmful-10"]
seeds = [0, 1]
"""


def written(tmp_path, text):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_a_block_is_every_combination(tmp_path):
    grid = load_grid(written(tmp_path, SMALL))
    assert grid.name == "small"
    assert len(grid.cells) == 2 * 2 * 2
    first = grid.cells[0]
    assert (first.scenario, first.arm.name, first.seed, first.prompts) == ("poison-10", "SFT", 0, 30)
    assert (first.learning_rate, first.steps) == (1e-4, 100)
    assert grid.cells[2].arm.method == "spf"
    assert grid.cells[2].arm.options == {"anchors": 8}
    assert len({cell.file_name for cell in grid.cells}) == 8


def test_a_cell_that_two_blocks_ask_for_is_run_once_with_what_either_wants(tmp_path):
    more = SMALL + '[[block]]\nscenarios = ["poison-10"]\narms = ["SFT"]\nattacks = ["prefill"]\nalong = 3\n'
    grid = load_grid(written(tmp_path, more))
    assert len(grid.cells) == 8
    assert (grid.cells[0].attacks, grid.cells[0].along) == (("prefill",), 3)
    assert grid.cells[1].attacks == ()


def test_the_name_of_a_cells_file_changes_with_all_that_its_result_depends_on(tmp_path):
    names = {load_grid(written(tmp_path, SMALL)).cells[2].file_name}
    for old, new in (("anchors = 8", "anchors = 9"), ("prompts = 30", "prompts = 31"), ("[0, 1]", "[3, 1]")):
        names.add(load_grid(written(tmp_path, SMALL.replace(old, new))).cells[2].file_name)
    names.add(load_grid(written(tmp_path, SMALL + "rates = [2]\n")).cells[2].file_name)
    assert len(names) == 5


def test_the_english_organism_has_scenarios_of_its_own(tmp_path):
    english = SMALL.replace('scenarios = ["poison-10", "harmful-10"]', 'organisms = ["english"]\nscenarios = ["gsm8k"]')
    grid = load_grid(written(tmp_path, english))
    assert {(cell.organism, cell.scenario_definition.lora) for cell in grid.cells} == {("english", 16)}
    assert grid.seeds == []
    with pytest.raises(DataError, match=r"expected gsm8k, .* found 'harmful-10'"):
        load_grid(written(tmp_path, english.replace("gsm8k", "harmful-10")))
    with pytest.raises(DataError, match=r"each of organisms"):
        load_grid(written(tmp_path, english.replace('"english"', '"latin"')))


def test_an_arm_that_trains_all_weights_is_refused_where_adapters_are_trained(tmp_path):
    english = SMALL.replace('scenarios = ["poison-10", "harmful-10"]', 'organisms = ["english"]\nscenarios = ["gsm8k"]')
    lisa = english.replace('{ method = "sft" }', '{ method = "lisa" }')
    with pytest.raises(DataError, match=r"scenarios that train all weights for the arm 'SFT', whose method 'lisa'"):
        load_grid(written(tmp_path, lisa))
    assert load_grid(written(tmp_path, lisa.replace("gsm8k", "gsm8k, full"))).cells


def test_the_shipped_english_grid_has_the_headline_arms_with_two_seeds():
    grid = load_grid("english")
    assert {cell.organism for cell in grid.cells} == {"english"}
    for arm in ("SFT", "mixing", "kl-left", "adaptive-kl-left"):
        seeds = {cell.seed for cell in grid.cells if cell.arm.name == arm and cell.scenario == "harmful-100"}
        assert seeds == {0, 1}


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_every_cell_is_in_one_shard(count):
    grid = load_grid("default")
    shards = [grid.shard(number, count) for number in range(1, count + 1)]
    names = [cell.file_name for shard in shards for cell in shard.cells]
    assert sorted(names) == sorted(cell.file_name for cell in grid.cells)
    assert max(len(shard.cells) for shard in shards) - min(len(shard.cells) for shard in shards) <= 1
    assert all(shard.name == grid.name for shard in shards)


def test_a_shard_has_cells_of_every_kind():
    """Were it every tenth cell, ten arms of very different cost would be one to a shard."""
    grid = load_grid("default")
    for number in range(1, 11):
        shard = grid.shard(number, 10)
        assert len({cell.arm.name for cell in shard.cells}) > 5
        assert len({cell.scenario for cell in shard.cells}) > 4
        assert [cell for cell in grid.cells if cell in shard.cells] == list(shard.cells)


@pytest.mark.parametrize(("number", "count"), [(0, 2), (3, 2), (1, 0), (-1, 3)])
def test_a_shard_that_is_not_there(number, count):
    with pytest.raises(gk.GeomkitError, match=f"expected a part of the grid from 1/{count} to {count}/{count}, found"):
        load_grid("smoke").shard(number, count)


def test_rates_and_lengths_multiply_the_scenarios_own(tmp_path):
    cell = load_grid(written(tmp_path, SMALL + "rates = [0.5]\nlengths = [10]\n")).cells[0]
    assert (cell.learning_rate, cell.steps) == (5e-5, 1000)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"poison-10"', '"poison-11"', "'poison-11'"),
        ("seeds", "seed", "'seed'"),
        ('"sft"', '"sftt"', "'sftt'"),
        ("seeds = [0, 1]", 'arms = ["left"]', "'left'"),
        ("seeds = [0, 1]", 'attacks = ["magic"]', "'magic'"),
        ("seeds = [0, 1]", "seeds = []", "found no cell"),
        ("[[block]]", "[[blocks]]", "'blocks'"),
        ("[[block]]", "[block]", r"under \[\[block\]\]"),
        ('{ method = "sft" }', '"sft"', r"\[arms\] of the form"),
        ("name =", "name", "expected TOML"),
    ],
)
def test_what_a_grid_does_not_know_is_refused(tmp_path, old, new, message):
    with pytest.raises(gk.GeomkitError, match=message):
        load_grid(written(tmp_path, SMALL.replace(old, new, 1)))


def test_a_grid_that_is_not_there():
    with pytest.raises(gk.GeomkitError, match=r"shipped grid \(default, english, limits, smoke\)"):
        load_grid("nowhere")


def test_the_shipped_grids_have_what_they_promise():
    default, limits = load_grid("default"), load_grid("limits")
    cells = default.cells + limits.cells
    plain = [cell for cell in cells if cell.rate == cell.length == 1 and cell.organism == 0]
    assert {cell.scenario for cell in plain} == set(scenarios_of(0))
    headline = {cell.arm.name for cell in plain if cell.seed == 4}
    defaults = {"adaptive-kl-left, 2048", "adaptive-kl-left, 2048 + benign"}
    kept = {"mixed-left, 2048", "kl-left, 2048", "kl-left, 2048 + benign", *defaults}
    assert headline == {"SFT", "mixing", "rank1", "mixing, 2048", *kept}
    for arm in headline:
        seeds = {(cell.scenario, cell.seed) for cell in plain if cell.arm.name == arm}
        assert all((scenario, seed) in seeds for scenario in SCENARIOS for seed in range(5))
    assert len(default.seeds) >= 2
    assert {cell.length for cell in limits.cells} >= {1, 10}
    assert len({cell.rate for cell in limits.cells}) >= 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rates = 1", "rates = a list of numbers, found 1"),
        ("rates = [-1]", "each of rates to be a finite number above 0, found -1"),
        ("lengths = [0]", "each of lengths to be a finite number above 0 to 10,000, found 0"),
        ("organisms = [0.5]", "each of organisms to be a whole number from 0"),
        ("arms = 'SFT'", "arms = a list of strings"),
        ("along = -1", "along to be a whole number from 0"),
        ("prompts = 0", "prompts to be a whole number from 1"),
        ("curvature = 1", "curvature = true or false"),
    ],
)
def test_a_block_with_a_wrong_value_is_refused(tmp_path, line, words):
    with pytest.raises(gk.GeomkitError, match=words):
        load_grid(written(tmp_path, SMALL + line + "\n"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("ancors = 8", "arm 'rank1': expected options of the method 'spf' .*anchors.*, found ancors"),
        ("seed = 1", "found seed"),
        ('rule = "rnk1"', "expected one of the rules"),
        ('rule = "rank1", rank = 3', "a rule that removes a subspace"),
        ("mix = -1", "expected mix to be a finite number from 0, found -1"),
        ("refresh_every = 0", "expected refresh_every to be a whole number from 1"),
        ('method = "lisa", rank = 3', "method 'lisa' .*rho"),
    ],
)
def test_an_arm_that_would_fail_when_it_is_run_is_refused(tmp_path, options, words):
    with pytest.raises(gk.GeomkitError, match=words):
        load_grid(written(tmp_path, SMALL.replace("anchors = 8", options)))
