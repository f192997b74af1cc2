"""Models by name: where the local Hugging Face cache has them. Nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from seesaw.core.errors import ModelError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(model: str | Path, *, revision: str | None = None, cache: str | None = None) -> Path:
    """The folder of a model that is given as a folder, or by its name on the Hugging Face hub.

    `revision` is a branch, tag or commit, `cache` the folder of the cache if it is not the usual one. A path that is
    neither comes back as it is, for whoever reads it to say so. Raises `ModelError` for a name that is not in the
    cache.
    """
    folder = Path(model)
    if folder.exists() or not _NAME.fullmatch(str(model)):
        if revision is not None and folder.exists():
            raise ModelError(
                f"revision={revision!r}: {str(model)!r} is a folder, which has none; leave it out"
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), revision=revision, cache_dir=cache, local_files_only=True))
    except HFValidationError:
        return folder
    except LocalEntryNotFoundError as error:
        at = "" if revision is None else f" --revision {revision}"
        where = "" if cache is None else f" --cache-dir {cache}"
        raise ModelError(
            f"model {str(model)!r}: no such folder, and not in the local Hugging Face cache; download it first: "
            f"hf download {model}{at}{where}"
        ) from error
