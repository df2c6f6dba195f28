"""Whether JupyterLab shows a dark theme, as far as its kernel can know: from the settings that JupyterLab saves."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

_SAVED = "@jupyterlab/apputils-extension/themes.jupyterlab-settings"
_COMMENT = re.compile(r"^\s*//[^\n]*$|/\*.*?\*/", re.MULTILINE | re.DOTALL)


def jupyterlab_is_dark(environment: Mapping[str, str]) -> bool:
    """Return whether this process is a kernel of a Jupyter server whose user has saved a dark theme for JupyterLab.

    Args:
        environment: The environment variables. A Jupyter server sets ``JPY_SESSION_NAME`` for its kernels, and no other
            program does; ``JUPYTERLAB_SETTINGS_DIR`` and ``JUPYTER_CONFIG_DIR`` move the settings.

    Example:
        >>> jupyterlab_is_dark({})
        False
    """
    if "JPY_SESSION_NAME" not in environment:
        return False
    config = Path(environment.get("JUPYTER_CONFIG_DIR") or Path.home() / ".jupyter")
    folder = Path(environment.get("JUPYTERLAB_SETTINGS_DIR") or config / "lab" / "user-settings")
    try:
        settings = json.loads(_COMMENT.sub("", (folder / _SAVED).read_text("utf-8")))
    except (OSError, ValueError):  # none is saved, or one that only JupyterLab reads: the theme is the light default
        return False
    return "dark" in str(settings.get("theme", "")).casefold() if isinstance(settings, dict) else False
