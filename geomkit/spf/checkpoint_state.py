"""The state of a guard in a checkpoint, with which a resumed run continues as the uninterrupted run would."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from geomkit.errors import SPFError
from geomkit.utils.files import parse_json, write_atomically

STATE_FILE = "spf.safetensors"
"""The last file of a checkpoint, moved into it atomically: a checkpoint that has it is complete."""


def save_state(state: Mapping[str, Tensor], description: Mapping[str, object], folder: Path) -> None:
    """Write a guard's state into a checkpoint.

    Args:
        state: The tensors.
        description: The result of :meth:`SPF.describe`.
        folder: The checkpoint, which exists.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(folder / STATE_FILE, save(tensors, {"spf": _to_json(description)}))


def load_state(folder: Path, description: Mapping[str, object]) -> dict[str, Tensor]:
    """Read a guard's state from a checkpoint.

    Args:
        folder: The checkpoint.
        description: The result of :meth:`SPF.describe` for the run that is resumed.

    Raises:
        SPFError: If the checkpoint has no state, it cannot be read, it belongs to a run with other settings, or another
            version of geomkit wrote it.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise SPFError(
            f"expected the state of SPF at {path}, found none: the safety loss before training is not known any more; "
            "resume from a checkpoint that was saved completely and under SPF; for one that was moved, say where it is "
            "now with SPFCallback(spf, resume=folder)"
        )
    try:
        with safe_open(path, "pt") as file:
            saved = parse_json((file.metadata() or {}).get("spf", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, ValueError) as error:
        raise SPFError(
            f"expected the state of SPF at {path}, found a corrupt file: {error}; resume from an earlier one"
        ) from None
    _refuse_other_settings(path, _flat(saved), _flat(json.loads(_to_json(description))))
    return state


def _refuse_other_settings(path: Path, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Compare the settings of two runs.

    Raises:
        SPFError: If the settings have other names, as in another version, or other values.
    """
    if unknown := sorted({*saved} ^ {*now}):
        raise SPFError(
            f"expected a state of SPF that this version of geomkit wrote at {path}, found one with other settings "
            f"({', '.join(unknown)}); end the run with the version that began it, or start anew"
        )
    if different := sorted(name for name in saved if saved[name] != now[name]):
        name = different[0]
        raise SPFError(
            f"expected a run that goes on with {name}={saved[name]!r}, found {now[name]!r}; resume with the same SPF"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, object]:
    """Return settings with nested mappings flattened to dotted names, such as ``rule.rank``."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": content for inner, content in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _to_json(description: Mapping[str, object]) -> str:
    return json.dumps(description, default=str, ensure_ascii=False)
