"""The state of a guard beside a checkpoint, so that a resumed run goes on as the uninterrupted one would."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from geomkit.errors import SPFError
from geomkit.utils.files import Draft

STATE_FILE = "spf.safetensors"
"""Written last into a checkpoint, and in one step: where it is, the checkpoint is complete."""


def save_state(state: Mapping[str, Tensor], description: Mapping[str, object], folder: Path) -> None:
    """Write a guard's state.

    Args:
        state: The tensors.
        description: What :meth:`SPF.describe` said.
        folder: The checkpoint, which exists.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with Draft(folder, STATE_FILE) as draft:
        draft.write(save(tensors, {"spf": _written(description)}))
        draft.move_to(folder / STATE_FILE)


def load_state(folder: Path, description: Mapping[str, object]) -> dict[str, Tensor]:
    """Read a guard's state.

    Args:
        folder: The checkpoint.
        description: What :meth:`SPF.describe` says of the run that goes on.

    Raises:
        SPFError: If there is none, it cannot be read, or it belongs to a run with other settings.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise SPFError(
            f"expected the state of SPF at {path}, found none: the safety loss before training is not known any more; "
            "resume from a checkpoint that was saved completely and under SPF"
        )
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("spf", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise SPFError(f"expected the state of SPF at {path}, found a corrupt file: {error}") from None
    now = json.loads(_written(description))
    if different := sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name)):
        name = different[0]
        raise SPFError(
            f"expected a run that goes on with {name}={saved.get(name)!r}, found {now.get(name)!r}; resume with the "
            "same SPF"
        )
    return state


def _written(description: Mapping[str, object]) -> str:
    return json.dumps(description, default=str, ensure_ascii=False)
