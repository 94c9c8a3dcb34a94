"""Names on Hugging Face's hub → folders on this machine."""

import re
from pathlib import Path

from megacocomix.errors import UserError

# Weights and configs; never a pickle, and never code.
WANTED = ("*.json", "*.safetensors", "*.model", "merges.txt")


def is_hub_name(name: str | Path) -> bool:
    """Whether `name` can only be meant as OWNER/NAME on the hub: no folder on this machine is called OWNER."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).parent.exists()


def local_folder(name: str | Path, download: bool = False, under: str | None = None) -> Path:
    """`name` itself where it is a path; for OWNER/NAME the folder in the hub's cache, which with `download` is filled
    first: a download that broke off goes on where it stopped. `under` takes one subfolder only. Raises UserError where
    it is not to be had."""
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
            f"{name} is no folder here, and cannot be had from Hugging Face's hub "
            f"({type(error).__name__}: {reason:.120})."
        ) from None
    return folder / under if under else folder
