"""The folder a model's path names: the snapshot of a Hugging Face cache, and what a folder without a checkpoint holds.

No files but those in `refs` are read; names of files tell.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from protos.model.files import AGAIN, CONVERT, ORIGINAL, is_gguf, read_bounded, shown

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
_MERGE = "merge it into its base model with peft (merge_and_unload), save that, and name the new folder"
_LISTED = 10_000  # names of a folder that are looked at
_CACHE_ENTRY = "models--"
_KINDS = (  # file names, what they are, the way out; the first that is there tells
    (r"adapter_config\.json|adapter_model\..*", "a LoRA adapter", _MERGE),
    (r".*\.gguf", "GGUF weights", "name the file itself, not its folder"),
    (r".*\.incomplete", "a download that was interrupted", "start the same download again; it continues"),
    (r"quantize_config\.json|quant_config\.json", "weights quantized with GPTQ or AWQ", ORIGINAL),
    (r"consolidated\..*\.pth|params\.json", "a checkpoint in Meta's format", "use the one with config.json"),
    (
        r"(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pth|pt|ckpt)(\.index\.json)?",
        "PyTorch pickles, which can run code",
        CONVERT,
    ),
    (r".*\.(h5|msgpack|onnx|npz|nemo|mlmodel)", "weights of another framework", CONVERT),
)


def resolve(path: Path) -> Path:
    """Return the snapshot of an entry of the Hugging Face cache (`models--ORG--NAME`), any other path as it is.

    It is the one that `refs/main` names, or the only one.
    """
    snapshots = path / "snapshots"
    try:
        if (path / "config.json").exists() or not snapshots.is_dir():
            return path
        if (path / "refs" / "main").exists():
            return snapshot_of(path) or path
        found = _names(snapshots)
    except (OSError, ValueError):
        return path
    return snapshots / found[0] if len(found) == 1 else path


def snapshot_of(entry: Path, revision: str = "main") -> Path | None:
    """Return the snapshot of a cache entry that a branch, tag or commit names, None where the entry has none.

    Raises OSError, ValueError: the entry cannot be read.
    """
    ref = entry / "refs" / revision
    name = read_bounded(ref, 200).decode("ascii").strip() if ref.is_file() else revision
    is_name = re.fullmatch(r"\w[\w.-]*", name) is not None
    return entry / "snapshots" / name if is_name and (entry / "snapshots" / name).is_dir() else None


def hub_source(path: Path) -> tuple[str, str] | None:
    """Return repository and commit of a path in a snapshot of a Hugging Face cache, None for any other path."""
    match = re.search(rf"/{_CACHE_ENTRY}([^/]+)/snapshots/([^/]+)", path.as_posix())
    return (match[1].replace("--", "/", 1), match[2]) if match else None


def on_this_node(path: Path) -> Path:
    """Return a path of a model as it is on this machine.

    A snapshot in the head's Hugging Face cache that is not at the same place here may be in this machine's own cache
    (`HF_HUB_CACHE`, `HF_HOME`). Any other path stays as it is.
    """
    if hub_source(path) is None or path.exists():
        return path
    from huggingface_hub import constants

    at = next(i for i, part in enumerate(path.parts) if part.startswith(_CACHE_ENTRY))
    here = Path(constants.HF_HUB_CACHE).joinpath(*path.parts[at:])
    return here if here.exists() else path


def served_name(path: Path) -> str:
    """Return the name of a model: of its file or folder, of its repository where that is a snapshot in a cache."""
    if is_gguf(path):
        return path.stem
    if path.parent.name == "snapshots" and "--" in (entry := path.parents[1].name):
        return entry.rsplit("--", 1)[-1]
    return path.name


def explain(folder: Path) -> str:
    """Return what a folder without a checkpoint that can be loaded holds, with the way out."""
    if not folder.is_dir():
        if folder.exists():
            return (
                kind_of([folder.name]) or "a file, not a folder: name the folder that holds config.json and safetensors"
            )
        return "there is no such folder: name the folder of a model"
    try:
        names = _names(folder)
        if "snapshots" in names:
            found = _names(folder / "snapshots")
            listed = f"name one in snapshots, such as {shown(found[0])}" if found else AGAIN
            return f"the folder is an entry of the Hugging Face cache without a snapshot in use: {listed}"
        names += interrupted_downloads(folder)
        inner = [name for name in names if (folder / name / "config.json").is_file()]
    except OSError as error:
        return f"the folder cannot be listed ({error.strerror})"
    return _explain_names(names, inner)


def interrupted_downloads(folder: Path) -> list[str]:
    """Return an unfinished file that a download left in a folder or where the Hugging Face cache keeps its files."""
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parents[1] / "blobs")
    return [each.name for place in places for each in islice(place.glob("*.incomplete"), 1)][:1]


def _explain_names(names: list[str], inner: list[str]) -> str:
    if entries := [name for name in names if name.startswith(_CACHE_ENTRY)]:
        return f"the folder is the Hugging Face cache: name one of its models, such as {shown(entries[0])}"
    if found := kind_of(names):
        return f"the folder holds {found}"
    if any(name.startswith("model.safetensors") for name in names):
        return f"the folder holds weights without config.json: {AGAIN}, with all JSON files"
    if stray := next((name for name in names if name.endswith(".safetensors")), None):
        return f"no index names the safetensors of the folder ({shown(stray)}): download {INDEX} as well"
    if inner:
        return f"the folder holds no model but folders of models: name one, such as {shown(inner[0])}"
    if "config.json" in names:
        return f"the folder holds config.json and no weights: {AGAIN}, with all safetensors files"
    return f"the folder {f'holds only {shown(names[0])}, ...' if names else 'is empty'}: name the folder of a model"


def kind_of(names: list[str]) -> str | None:
    """Return what the first telling file is, with the way out."""
    for pattern, kind, way_out in _KINDS:
        if match := next((name for name in names if re.fullmatch(pattern, name)), None):
            return f"{kind} ({shown(match)}): {way_out}"
    return None


def _names(folder: Path) -> list[str]:
    return sorted(each.name for each in islice(folder.iterdir(), _LISTED))
