"""The one way from what a user calls a model to its files on this machine: a path, or a name on a hub.

A path that exists goes first, then the cache of the hub, then a download into this cache.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.hub.cache import cache_folder, cached_model, is_offline
from cluster.hub.contents import lacking, lacks_only_tokenizer
from cluster.hub.download import download
from cluster.hub.names import HubError, HubName, Need, OnProgress
from protos.errors import UserError
from protos.model.files import is_gguf
from protos.model.folder import resolve


def local_model(text: str, path: Path) -> Path:
    """Return where a model is on this machine, or would be as a path. Nothing is downloaded.

    Args:
        text: as the user wrote it.
        path: this text as a path.
    """
    if os.path.lexists(path) or (name := HubName.parse(text)) is None:
        return resolve(path)
    return cached_model(name) or path


def as_named(text: str, path: Path) -> Path:
    """Return the path of a model, or where it is absent and the text names one on a hub, this name."""
    return Path(text) if not os.path.lexists(path) and HubName.parse(text) is not None else path


def find_model(
    text: str, path: Path, need: Need = "weights", on_progress: OnProgress = lambda phase, done, total: None
) -> Path:  # fmt: skip
    """Return where a model is on this machine, after the download of what is missing.

    A text that is no name of a hub is a path, which may be absent.

    Raises HubError: the hub does not give the model, or nothing may be downloaded.
    """
    if os.path.lexists(path) or (name := HubName.parse(text)) is None:
        return resolve(path)
    found = cached_model(name)
    absent = ["anything"] if found is None else [] if is_gguf(found) else lacking(found, need)
    if found is not None and not absent:
        return found
    is_usable = found is not None and need == "weights" and lacks_only_tokenizer(absent)
    if is_offline():
        if found is not None and is_usable:
            return found
        raise name.error(_offline(name, None if found is None else absent))
    if name.file is not None and need != "weights":
        way = "download it first" if name.hub != "huggingface" else f"run: hf download {name.repo} {name.file}"
        raise name.error(f"is not on this machine, and settings alone are not downloaded of a GGUF file: {way}")
    try:
        return download(name, need, on_progress)
    except HubError as error:
        if found is not None and is_usable:
            return found
        raise HubError(name, f"{error.problem} (there is no folder {path} either)") from error


def model_argument(
    key: str, path: Path, need: Need = "weights", on_progress: OnProgress = lambda phase, done, total: None
) -> Path:  # fmt: skip
    """Return `find_model` of an option or argument of the command line. Raises UserError, with `key` before it."""
    try:
        return find_model(str(path), path, need, on_progress)
    except HubError as error:
        raise UserError(f"{key}: {error}") from error


def _offline(name: HubName, absent: list[str] | None) -> str:
    cache = cache_folder(name)
    what = f"is not in the cache {cache}" if absent is None else f"its copy in the cache {cache} lacks {absent[0]}"
    return f"{what}, and HF_HUB_OFFLINE forbids downloads: unset it, or copy the model into the cache"
