"""The site of mkdocs: its pages are the files of the repository where they are, and a reference of the API.

Every file keeps its path, so that links between READMEs and notebooks hold on the site as they do in the repository.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the site instead of those of ``docs_dir``."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:  # the others are those of the theme
        files.remove(file)
    pages = [path for path in named_pages(config.nav) if not path.startswith("reference/")]
    for path in dict.fromkeys([*pages, *(linked for page in pages for linked in links_of(page))]):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for path, text in reference().items():
        files.append(File.generated(config, path, content=text))
    return files


def named_pages(nav: object) -> Iterator[str]:
    """Yield the paths in a navigation."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from named_pages(part)


def links_of(page: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to: figures, sources, the licence."""
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent.joinpath(target).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path.relative_to(ROOT).as_posix()


def reference() -> dict[str, str]:
    """Return the pages of the reference by path: the public names, and a page for each folder with its modules."""
    names = "\n\n".join(f"::: {place}" for place in public_names())
    pages = {"reference/index.md": f"# Public names\n\nAll of `import geomkit as gk`.\n\n{names}\n"}
    for folder in sorted((ROOT / "geomkit").iterdir()):
        modules = [
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in sorted(folder.rglob("*.py"))
            if not path.name.startswith("_")
        ]
        if modules:
            docs = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            body = "\n\n".join(f"::: {module}" for module in modules)
            pages[f"reference/{folder.name}.md"] = f"# {folder.name}\n\n{docs}\n\n{body}\n"
    return pages


def public_names() -> list[str]:
    """Return the modules and names of the stub, in its order."""
    stub = ast.parse((ROOT / "geomkit/__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module]
    return [f"geomkit.{node.module}.{alias.name}" for node in imports for alias in node.names]


class Roles(griffe.Extension):
    """Makes links of the roles in docstrings, such as ``:func:`geomkit.conflict```, where the site has their target."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Replace the roles in a docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(role: re.Match[str]) -> str:
    short, target = role.groups()
    shown = target.rpartition(".")[2] if short else target
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
