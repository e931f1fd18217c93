"""Read the tokens that files beside `tokenizer.json` declare, and add those it lacks, as transformers does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from protos.errors import UserError

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LISTS = ("extra_special_tokens", "additional_special_tokens")  # the first that is there counts


def with_legacy_files(
    config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], added_tokens: Mapping[str, int]
) -> dict[str, Any]:
    """Return `tokenizer_config.json` with what older files say; they count only where it has no added_tokens_decoder.

    Args:
        special_tokens_map: content of `special_tokens_map.json`.
        added_tokens: content of `added_tokens.json`: ids by text.
    """
    if "added_tokens_decoder" in config:
        return dict(config)
    merged = {**config, **special_tokens_map}
    special = {text for _, text, _ in _declared(merged)}
    merged["added_tokens_decoder"] = {
        str(token_id): {"content": text, "normalized": text not in special, "special": text in special}
        for text, token_id in added_tokens.items()
    }
    return merged


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and its like by name, those that only this model has included."""
    return {name: text for name, text, _ in _declared(config) if name}


def add_declared_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens of `added_tokens_decoder` and all special tokens that `tokenizer` lacks, in transformers' order.

    Raises:
        UserError: the id that a file gives a token is not the one it gets.
    """
    known = tokenizer.get_added_tokens_decoder().values()
    texts, same = {token.content for token in known}, {repr(token) for token in known}
    declared = list(_declared(config))
    named = {text for name, text, _ in declared if name}
    decoder = sorted((int(i), _added_token(value)) for i, value in (config.get("added_tokens_decoder") or {}).items())
    new = [token for _, token in decoder if repr(token) not in same]
    for token in new:
        token.special = token.special or token.content in named
    texts |= {token.content for token in new}
    for _, text, value in declared:
        if text not in texts:
            new.append(_added_token({"special": True, **value} if isinstance(value, Mapping) else value))
            texts.add(text)
    before = {token.content: tokenizer.token_to_id(token.content) for _, token in decoder}
    tokenizer.add_tokens(new)
    for token_id, token in decoder:
        given = tokenizer.token_to_id(token.content)
        if before[token.content] is None and given != token_id:
            problem = f"must be {token_id}, as in tokenizer_config.json or added_tokens.json: make the files agree"
            raise UserError(f"added token {token.content!r}: gets the id {given}: {problem}")


def _declared(config: Mapping[str, Any]) -> Iterable[tuple[str, str, Any]]:
    """Yield (name, text, value) of every special token; the name is empty for those that have none."""
    lists: Any = next((config[key] for key in _LISTS if config.get(key)), [])
    if not isinstance(lists, list | Mapping):
        raise UserError(f"extra_special_tokens: {lists!r}: must be a list of tokens, or tokens by name")
    own = {key: value for key, value in config.items() if key.endswith("_token") and key not in _NAMES}
    own |= lists if isinstance(lists, Mapping) else {}
    for name, value in {**{key: config.get(key) for key in _NAMES}, **own}.items():
        if (text := _text(value)) is not None:
            yield name, text, value
    for value in () if isinstance(lists, Mapping) else lists:
        if (text := _text(value)) is not None:
            yield "", text, value


def _text(value: Any) -> str | None:
    """Return the text of a token, which files write as text or as an object with a `content`."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _added_token(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if _text(value) is None:
        raise UserError(f"added token {value!r}: must have a content, its text")
    return AddedToken(value["content"], **{key: value[key] for key in _FLAGS if key in value})
