"""Where the shipped data lies: inside an installed wheel, or beside the package in a checkout."""

from pathlib import Path

from geomkit.errors import DataError

_PACKAGE = Path(__file__).parent


def data_dir() -> Path:
    """Return the folder that holds the organism, its evaluation sets and its scenarios.

    Raises:
        DataError: If the installation carries no data.
    """
    for folder in (_PACKAGE / "_data", _PACKAGE.parent / "data"):
        if folder.is_dir():
            return folder
    raise DataError(
        f"expected the shipped data in {_PACKAGE / '_data'} or {_PACKAGE.parent / 'data'}, found neither; "
        "reinstall geomkit"
    )
