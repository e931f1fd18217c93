"""The tokenizer and the chat templates of a GGUF file, as the content of `tokenizer.json` and its like.

The file names the rules by which text is cut before merging (`tokenizer.ggml.pre`) and does not hold them; those here
are the ones of the models' own `tokenizer.json`. Other names are refused: a wrong rule gives other tokens, silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from protos.model.files import is_gguf
from protos.model.gguf.file import GgufError, GgufFile, read_gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # in tokenizer.ggml.token_type
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_NAMED = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


_PRE: Mapping[str, dict[str, Any]] = {  # what each name of a rule changes
    "qwen2": {"pre_tokenizer": _split(_QWEN2), "normalizer": {"type": "NFC"}},
    "smollm": {"pre_tokenizer": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]},
    "llama-bpe": {"pre_tokenizer": _split(_LLAMA3), "ignore_merges": True, "add_bos": True},
    "gpt-2": {"pre_tokenizer": [_byte_level(use_regex=True)]},
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def read_tokenizer(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the content of `tokenizer.json`, `tokenizer_config.json` and two empty older files. Raises GgufError."""
    file = read_gguf(path)
    settings = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.settings.items()
        if key.startswith("tokenizer.ggml.")
    }
    if "model" not in settings:
        raise file.error("tokenizer.ggml.model", "missing: the file has no tokenizer: use another, or ids of tokens")
    if settings["model"] != "gpt2":
        raise file.error("tokenizer.ggml.model", f"{settings['model']}: only gpt2 (byte-level BPE) is read")
    name = str(settings.get("pre", "missing"))
    if (rules := _PRE.get(_ALIASES.get(name, name))) is None:
        raise file.error("tokenizer.ggml.pre", f"{name}: must be one of {', '.join((*_PRE, *_ALIASES))}")
    tokens, kinds = _tokens(file, settings)
    layout = _layout(file, settings, rules, tokens, kinds)
    config: dict[str, Any] = {}
    for token_name, key in _NAMED.items():
        index = settings.get(f"{key}_token_id")
        if isinstance(index, int) and index < len(tokens) and kinds[index] in (_CONTROL, _UNKNOWN, _USER):
            config[token_name] = tokens[index]
    if templates := _chat_templates(file):
        config["chat_template"] = templates
    return json.dumps(layout).encode(), [config, {}, {}]


def tokenizer_file(model: Path) -> tuple[Path, bool]:
    """Return the file that holds the tokenizer of a model, and whether it does. Raises GgufError."""
    if is_gguf(model):
        return model, "tokenizer.ggml.model" in read_gguf(model).settings
    path = model / "tokenizer.json"
    return path, path.exists()


def _tokens(file: GgufFile, settings: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = settings.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise file.error("tokenizer.ggml.tokens", "must be a list of texts")
    kinds = settings.get("token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise file.error("tokenizer.ggml.token_type", f"must be a list of {len(tokens)} numbers, one a token")
    return tokens, kinds


def _layout(
    file: GgufFile, settings: Mapping[str, Any], rules: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    added = [index for index, kind in enumerate(kinds) if kind in (_CONTROL, _USER, _UNKNOWN)]
    last = max((index for index, kind in enumerate(kinds) if kind in (_NORMAL, _BYTE)), default=-1)
    # as in tokenizer.json, what directly follows the model's own vocabulary is not part of it
    behind = {index for index in added if index > last}
    if len(behind) != sum(1 for _ in takewhile(behind.__contains__, range(last + 1, len(tokens)))):
        behind = set()  # a gap: ids must be said
    vocab = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _UNUSED and index not in behind
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokens[index], **flags, "special": kinds[index] != _USER} for index in added
        ],
        "normalizer": rules.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rules["pre_tokenizer"]},
        "post_processor": _post_processor(settings, rules, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(rules.get("ignore_merges", False)),
            "vocab": vocab,
            "merges": _merges(file, settings, vocab),
        },
    }


def _merges(file: GgufFile, settings: Mapping[str, Any], vocab: Mapping[str, int]) -> list[list[str]]:
    """Return the merges as pairs; the first of a pair has at least one character, which may be a space."""
    merges = settings.get("merges")
    if not isinstance(merges, list):
        raise file.error("tokenizer.ggml.merges", "must be a list of texts")
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        pair = [merge[:cut], merge[cut + 1 :]] if cut > 0 else []
        if not pair or pair[0] not in vocab or pair[1] not in vocab or "".join(pair) not in vocab:
            raise file.error("tokenizer.ggml.merges", f"{ascii(merge)[:80]}: must be two tokens that make a third")
        pairs.append(pair)
    return pairs


def _post_processor(
    settings: Mapping[str, Any], rules: Mapping[str, Any], tokens: list[str]
) -> dict[str, Any] | None:  # fmt: skip
    index = settings.get("bos_token_id")
    if not settings.get("add_bos_token", rules.get("add_bos", False)) or not isinstance(index, int):
        return None
    if not 0 <= index < len(tokens):
        return None
    bos = tokens[index]
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _chat_templates(file: GgufFile) -> list[dict[str, str]]:
    """Return the templates as `tokenizer_config.json` lists them."""
    key = "tokenizer.chat_template"
    named = {"default": file.settings.get(key)}
    named |= {each[len(key) + 1 :]: value for each, value in file.settings.items() if each.startswith(f"{key}.")}
    for name, text in named.items():
        if text is not None and not isinstance(text, str):
            raise GgufError(f"{file.path}: {key}: the template {name} must be text")
    return [{"name": name, "template": str(text)} for name, text in named.items() if text is not None]
