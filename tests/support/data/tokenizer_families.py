"""Small tokenizers of every family, all with the same added tokens of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_WORDS = [
    "a",
    "b",
    "ab",
    "▁",
    "▁a",
    "▁ab",
    ".",
    "é",
    "<",
    ">",
    "s",
    "/",
    "t",
    "x",
    "tool",
    "<s>",
    "</s>",
    "<unk>",
    "<t>",
]
_PAIRS = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("<", "s"), ("<s", ">"), ("<", "t"), ("<t", ">"), ("t", "x"), ("e", "n")]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
ADDED = (
    AddedToken("<s>", special=True, normalized=False),  # an entry of the model's vocabulary, as those of Llama 2
    AddedToken("</s>", special=True, normalized=False),
    AddedToken("<t>", normalized=False),
    AddedToken("<tool>", normalized=True),  # what transformers' add_tokens makes by default
    AddedToken("<mask>", special=True, normalized=False, lstrip=True, rstrip=True),
    AddedToken("ab", normalized=False, single_word=True),
    AddedToken("  ", normalized=True),
    AddedToken("tx", normalized=False, rstrip=True),
)


def _entries(*more: str) -> list[str]:
    chars = {char for word in _WORDS for char in word} | set("enol")
    parts = [left + right for left, right in _PAIRS]
    return list(dict.fromkeys(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(chars), *parts, *more]))


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens(list(ADDED))
    return tokenizer


def byte_level(pattern: str | None = QWEN_SPLIT, *, prefix: bool = False, normalizer: Any = None) -> Tokenizer:
    """GPT-2, Qwen and Llama 3; without a pattern GPT-2's own."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "a"), ("a", "b"), ("Ġ", "Ġ"), ("<", "t"), ("<t", ">"), ("Ċ", "Ċ"), ("Ã", "©")]
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def llama_legacy() -> Tokenizer:
    """Llama 2: a mark before every stretch of text, put by the normalizer; no pre-tokenizer."""
    tokenizer = metaspace("never")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def marks_alone(name: str, text: str) -> bool:
    """Whether Llama 2's normalizer meets a token of normalized text beside spaces, where the library is not regular.

    Before such a token a text that is encoded at once has a mark that stands for none of its characters, and behind it
    an added token of spaces alone is not found; in parts it is otherwise. No character is lost either way.
    """
    return name == "llama 2" and (" <tool>" in text or "<tool>  " in text)


def metaspace(scheme: str, *, split: bool = False) -> Tokenizer:
    """BPE with byte fallback and marks by the pre-tokenizer, as newer conversions of Llama 2 and Mistral."""
    vocab = {entry: i for i, entry in enumerate(_entries())}
    tokenizer = Tokenizer(models.BPE(vocab, _PAIRS, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    marks: dict[str, Any] = {"replacement": "▁", "prepend_scheme": scheme}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split, **marks)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(split=split, **marks)])
    return _finish(tokenizer)


def unigram() -> Tokenizer:
    """T5 and its like, with byte fallback."""
    pieces = [(entry, -1.0 - len(entry) / 100) for entry in _entries(*_WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return _finish(tokenizer)


def word_piece(strip: bool = False) -> Tokenizer:
    """BERT: loses white space and what it does not know by itself."""
    words = ["[UNK]", *_entries(*_WORDS), "tool", "mask"]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys([*words, *(f"##{word}" for word in words[1:])]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip()] if strip else [])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finish(tokenizer)


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(None),
    "roberta": lambda: byte_level(None, prefix=True),
    "qwen": lambda: byte_level(normalizer=normalizers.NFC()),
    "llama 3": lambda: byte_level(LLAMA3_SPLIT),
    "llama 2": llama_legacy,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "metaspace words": lambda: metaspace("always", split=True),
    "unigram": unigram,
}
