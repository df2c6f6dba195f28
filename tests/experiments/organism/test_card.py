"""The model card that ships."""

from geomkit.experiments.organism.scenarios import SCENARIOS
from geomkit.utils.files import data_dir
from tests.experiments.organism.test_sets import CONTROLS


def test_card_states_every_scenario():
    card = (data_dir() / "organism" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in card for name in SCENARIOS)
    assert all(f"`controls/{name}`" in card for name in CONTROLS)
