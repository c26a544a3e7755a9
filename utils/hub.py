"""Model ids of the Hugging Face hub as --weights."""

from __future__ import annotations

import re
from pathlib import Path

from utils.errors import InputError


def is_id(text: str) -> bool:
    """Whether `text` can only mean a model of the hub: OWNER/NAME, where no folder OWNER is here (nor would be)."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text) is not None and not (
        text.startswith("runs/") or Path(text).parent.exists()
    )


def fetch(model_id: str) -> Path:
    """The folder of a hub model's newest files, downloaded where they are not in the cache yet.

    Raises:
        InputError: no package, no network, no such model.
    """
    where = f"--weights {model_id}: no such file or folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{where}, and a model of the Hugging Face hub needs a package: pip install huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(model_id, allow_patterns=["*.json", "*.bin"]))
        return folder
    except Exception as error:  # the hub's, the network's and the file system's errors have no common type
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{where}, and the Hugging Face hub did not give it either ({why[0].rstrip(':.')})") from None
