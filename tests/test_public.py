"""What is promised to importers: every public name resolves, shadows nothing and costs nothing until it is used."""

import pkgutil
import subprocess
import sys

import pytest

import geomkit
from geomkit import errors

HEAVY = ("torch", "transformers", "datasets", "pandas", "plotly", "sklearn", "scipy", "typer")


def loaded_after(statement):
    """Which heavy libraries a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_every_public_name_resolves_and_says_what_it_is():
    for name in geomkit.__all__:
        assert getattr(geomkit, name).__doc__, name
        assert getattr(geomkit, name).__name__ == name
    assert set(geomkit.__all__) == set(geomkit._ROOMS)
    assert set(geomkit.__all__) <= set(dir(geomkit))


def test_no_public_name_is_shadowed_by_a_module():
    modules = {module.name for module in pkgutil.iter_modules(geomkit.__path__)}
    assert len(modules) > 20
    assert not modules & set(geomkit.__all__)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'spectrums'; it has SPF, .*spectrum"):
        _ = geomkit.spectrums


def test_import_stays_light():
    assert loaded_after("import geomkit") == set()
    assert loaded_after("import geomkit.cli") <= {"typer"}


def test_collection_and_spf_run_without_the_libraries_of_figures_and_tables():
    found = loaded_after("import geomkit.collect, geomkit.spf, geomkit.spf.callback")
    assert not found & {"datasets", "pandas", "plotly", "sklearn"}


def test_every_error_is_caught_by_one_name():
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(kinds) == 5
    assert all(issubclass(kind, geomkit.GeomkitError) for kind in kinds)
