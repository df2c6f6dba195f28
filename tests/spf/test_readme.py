"""The README of SPF agrees with the registry of rules and with the tests."""

import re
from pathlib import Path

from geomkit.spf.rules import RULES

ROOT = Path(__file__).parents[2]
README = (ROOT / "geomkit" / "spf" / "README.md").read_text("utf-8")


def test_the_table_of_the_rules_is_the_registry():
    rows = [
        f"| `{rule.name}` | {rule.badge} | {rule.formula} | {rule.promise_text} | {rule.source} | {rule.when} |"
        for rule in RULES.values()
    ]
    assert all(rule.when for rule in RULES.values())
    assert re.findall(rf"^\| `(?:{'|'.join(RULES)})` .*$", README, re.MULTILINE) == rows


def test_every_row_of_the_support_matrix_names_tests_that_there_are():
    rows = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", README)
    assert len(rows) > 12
    for path, name in rows:
        text = (ROOT / path).read_text("utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), name


def test_every_path_in_the_readme_exists():
    paths = re.findall(r"`(tests/[\w/]+\.py)", README)
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert all((ROOT / path).is_file() for path in paths)
    assert links
    assert all((ROOT / "geomkit" / "spf" / link).exists() for link in links)
