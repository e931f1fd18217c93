"""What the caches of Hugging Face and ModelScope on this machine hold. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.hub.contents import choose_gguf
from cluster.hub.names import HubError, HubName
from protos.model.folder import snapshot_of

_LISTED = 10_000  # files of a snapshot that are looked at
_MODELSCOPE_CACHE = ("MODELSCOPE_CACHE", "~/.cache/modelscope")  # the variable, its default
_BRANCHES = ("master", "main")  # of ModelScope


def cache_folder(name: HubName) -> Path:
    """Return the folder where downloads of a hub are kept."""
    if name.hub == "huggingface":
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)
    variable, default = _MODELSCOPE_CACHE
    return Path(os.environ.get(variable) or default).expanduser()


def is_offline() -> bool:
    """Return whether `HF_HUB_OFFLINE` forbids downloads: of both hubs."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def cached_model(name: HubName) -> Path | None:
    """Return the snapshot of a model in its hub's cache, or the GGUF file in it that is named; None: not there.

    A snapshot may lack files, as after a download that was interrupted.
    """
    try:
        folder = _snapshot(name)
        if folder is None or name.file is None:
            return folder
        files = [each.relative_to(folder).as_posix() for each in _gguf_files(folder)]
        file = folder / choose_gguf(name, files)
        return file if file.is_file() else None
    except (OSError, ValueError, HubError):
        return None


def _snapshot(name: HubName) -> Path | None:
    if name.hub == "huggingface":
        entry = cache_folder(name) / f"models--{name.repo.replace('/', '--')}"
        return snapshot_of(entry, name.revision or "main")
    root, older = cache_folder(name), name.repo.replace(".", "___")  # as older versions of the library laid it out
    places = [root / "models" / older, root / "hub" / "models" / older] if name.revision is None else []
    snapshots = root / "models" / name.repo.replace("/", "--") / "snapshots"
    places += [snapshots / revision for revision in ((name.revision,) if name.revision else _BRANCHES)]
    return next((place for place in places if place.is_dir()), None)


def _gguf_files(folder: Path) -> list[Path]:
    return [each for _, each in zip(range(_LISTED), folder.rglob("*"), strict=False) if each.suffix.lower() == ".gguf"]
