"""The link from results to figures: names are resolved when a figure is drawn, so a test must find wrong ones."""

import ast
from pathlib import Path

import geomkit
from geomkit import plots


def drawn_names(method: ast.FunctionDef) -> list[str]:
    """Return the names that a method gives to ``draw``."""
    calls = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    return [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "draw"]


def test_every_plot_method_names_a_figure_that_exists() -> None:
    methods = {
        f"{path.stem}.{cls.name}": drawn_names(method)
        for path in Path(geomkit.__file__).parent.rglob("*.py")
        for cls in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(cls, ast.ClassDef)
        for method in cls.body
        if isinstance(method, ast.FunctionDef) and method.name == "plot" and cls.name != "DrawnResult"
    }
    assert len(methods) >= 18
    assert all(methods.values())
    assert {name for names in methods.values() for name in names} <= set(plots.__all__)
