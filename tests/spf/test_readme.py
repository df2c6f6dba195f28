"""The README says of SPF what the registry and the tests say."""

import re
from pathlib import Path

from geomkit.spf.rules import RULES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_of_the_rules_is_the_registry():
    for rule in RULES.values():
        row = f"| `{rule.name}` | {rule.badge} | {rule.formula} | {rule.guarantee} | {rule.source} |"
        assert row in README, rule.name


def test_every_row_of_the_support_matrix_names_tests_that_there_are():
    rows = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    assert len(rows) > 12
    for file, name in rows:
        text = (ROOT / "tests" / "spf" / file).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), name
