"""What is promised to importers: every public name resolves, and costs nothing until it is used."""

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

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
        value = getattr(geomkit, name)
        assert value.__doc__, name
        assert value.__name__ in {name, f"geomkit.{name}"}
    assert set(geomkit.__all__) <= set(dir(geomkit))


def test_there_are_at_most_38_public_names():
    assert 20 < len(geomkit.__all__) <= 38


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="spectrums"):
        _ = geomkit.spectrums


def test_import_stays_light():
    assert loaded_after("import geomkit") == set()
    assert loaded_after("import geomkit.cli.main") <= {"typer"}


def test_collection_and_spf_run_without_the_libraries_of_figures_and_tables():
    found = loaded_after("import geomkit.collection.collect, geomkit.spf.settings, geomkit.spf.callback")
    assert not found & {"datasets", "pandas", "plotly", "sklearn"}


def test_every_error_is_caught_by_one_name():
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(kinds) == 5
    assert all(issubclass(kind, geomkit.GeomkitError) for kind in kinds)


def test_every_module_is_named_where_its_folder_is_described():
    package = Path(geomkit.__file__).parent
    for description in package.glob("*/**/__init__.py"):
        text = description.read_text()
        for module in description.parent.iterdir():
            is_room = module.is_dir() and (module / "__init__.py").is_file()
            if is_room or (module.suffix == ".py" and module.stem != "__init__"):
                assert re.search(rf"\b{module.stem}\b", text), module.relative_to(package)


def test_no_module_imports_the_root_of_the_package_behind_which_an_import_upwards_could_hide():
    package = Path(geomkit.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules = [node.module] if isinstance(node, ast.ImportFrom) else names
            assert "geomkit" not in modules, path


@pytest.mark.parametrize("name", geomkit._FORMER_NAMES)
def test_a_name_that_left_the_root_says_where_it_is(name):
    with pytest.raises(AttributeError, match=f"geomkit.{name} is .* since version 0.2.0"):
        getattr(geomkit, name)
    place = geomkit._FORMER_NAMES[name]
    if place.startswith("geomkit."):
        assert pkgutil.resolve_name(place)


def test_completing_a_name_imports_nothing_heavy_and_finds_it():
    # A fresh interpreter, as torch is here already; the completer is that of JupyterLab's kernels.
    code = (
        "import geomkit as gk\n"
        "from IPython.core.completer import provisionalcompleter\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "shell.user_ns['gk'] = gk\n"
        "with provisionalcompleter():\n"
        "    found = [each.text for each in shell.Completer.completions('gk.con', 6)]\n"
        "assert found == ['conflict', 'conflict_directions'], found\n"
        "assert gk.conflict.__name__ == 'conflict'"
    )
    assert "torch" not in loaded_after(code.rpartition("\n")[0])
    assert "torch" in loaded_after(code)


def test_the_help_on_conflict_fits_a_notebooks_pane_and_has_an_example():
    text = inspect.getdoc(geomkit.conflict)
    assert max(map(len, text.splitlines())) <= 90
    assert ">>> " in text
