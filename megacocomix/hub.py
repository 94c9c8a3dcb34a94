"""Names on Hugging Face's hub → folders on this machine."""

import re
from pathlib import Path

from megacocomix.errors import UserError

# Weights and configs; never pickles, never code.
WANTED = ("*.json", "*.safetensors", "*.model", "merges.txt")


def is_hub_name(name: str | Path) -> bool:
    """Whether `name` is OWNER/NAME on the hub: it has that form, and no folder OWNER exists on this machine."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).parent.exists()


def local_folder(name: str | Path, download: bool = False, under: str | None = None) -> Path:
    """`name` itself if it is a path, else the folder of OWNER/NAME in the hub's cache. With `download`, missing files
    are downloaded first, and an interrupted download resumes. `under` selects one subfolder. Raises UserError if the
    folder is not available."""
    if not is_hub_name(name):
        return Path(name) / under if under else Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{under}/{pattern}" for pattern in WANTED] if under else list(WANTED)
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=wanted, local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is not a folder on this machine, and cannot be read from Hugging Face's hub "
            f"({type(error).__name__}: {reason:.120})."
        ) from None
    return folder / under if under else folder
