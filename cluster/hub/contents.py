"""Which files of a repository make a model, and what of them a folder lacks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cluster.common.text_format import shorten
from cluster.hub.names import HubName, Need
from protos.model.folder import INDEX, kind_of
from protos.model.weight_files import CheckpointError, weight_files

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_CONFIGS = {_CONFIG, "generation_config.json", "sparse_attention_config.json", INDEX}
_TOKEN_TEXTS = {"merges.txt", "vocab.txt"}
_WEIGHTS = ".safetensors"
_OTHER_FORM = "consolidated"  # the same weights again, as Mistral stores them
_SHOWN = 8  # names of files in an error


def choose_files(name: HubName, files: Collection[str], need: Need) -> list[str]:
    """Return the files of a repository to be downloaded; those in its folders are never needed.

    Raises HubError: it holds no model that can be loaded.
    """
    if name.file is not None:
        return [choose_gguf(name, files)]
    top = sorted(file for file in files if "/" not in file)
    if _CONFIG not in top:
        if ggufs := [file for file in files if file.lower().endswith(".gguf")]:
            raise name.error(f"holds GGUF files: name one, such as {name}:{min(ggufs)}")
        raise name.error(f"holds {kind_of(top) or 'no config.json: name the repository of a language model'}")
    chosen = {file for file in top if file in _CONFIGS or (file.startswith("config") and file.endswith(".json"))}
    if need != "config":
        chosen |= {file for file in top if file.endswith((".json", ".jinja")) or file in _TOKEN_TEXTS}
    if need == "weights":
        weights = [file for file in top if file.endswith(_WEIGHTS)]
        weights = [file for file in weights if not file.startswith(_OTHER_FORM)] or weights
        if not weights:
            raise name.error(f"holds {kind_of(top) or 'no safetensors: name a repository that has them'}")
        chosen |= set(weights)
    return sorted(chosen)


def choose_gguf(name: HubName, files: Collection[str]) -> str:
    """Return the GGUF file of a repository that a name means. Raises HubError: there is none, or more than one."""
    assert name.file is not None
    if name.file.lower().endswith(".gguf"):
        found = [file for file in files if file == name.file]
    else:
        kind = name.file.lower()
        found = [file for file in files if file.lower().endswith((f"-{kind}.gguf", f".{kind}.gguf", f"_{kind}.gguf"))]
    if len(found) == 1:
        return found[0]
    ggufs = sorted(found or (file for file in files if file.lower().endswith(".gguf")))
    listed = ", ".join(shorten(file) for file in ggufs[:_SHOWN]) + (", ..." if len(ggufs) > _SHOWN else "")
    if found:
        raise name.error(f"more than one file is meant: name one of {listed}")
    raise name.error(f"there is no such file: {f'there are {listed}' if ggufs else 'the repository has no GGUF files'}")


def lacking(folder: Path, need: Need) -> list[str]:
    """Return what a folder lacks to be the model of a repository; a tokenizer comes last."""
    absent = [] if (folder / _CONFIG).is_file() else [_CONFIG]
    if need == "weights":
        try:
            absent += [file for file in weight_files(folder) if not (folder / file).is_file()]
        except CheckpointError:
            absent.append(INDEX)
    if need != "config" and not (folder / _TOKENIZER).is_file():
        absent.append(_TOKENIZER)
    return absent


def lacks_only_tokenizer(absent: list[str]) -> bool:
    """Return whether what is there can be used, with token ids in place of text."""
    return absent == [_TOKENIZER]
