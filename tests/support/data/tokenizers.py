"""Tokenizers for tests: the needle model's (byte-level) and a small one of the Llama 2 kind."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors

from cluster.text.token_bytes import token_bytes
from cluster.text.tokenizer import TextTokenizer
from tests.support import paths

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
TRAINED = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\\nAnswer:' }}"  # the needle model's prompt
OPEN_THINK = "{{ messages[0].content }}<|im_start|>assistant\n<think>\n"


def sentencepiece_like() -> Tokenizer:
    """A small tokenizer of the Llama 2 kind: word-start marks, byte fallback, a stripped first space."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", ".", "▁a", "ab", "▁ab", "é"]:
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Let the tokenizer put `<s>` before every text."""
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return tokenizer


def wrap(tokenizer: Tokenizer, **config: Any) -> TextTokenizer:
    return TextTokenizer(tokenizer.to_str().encode(), config, None)


def with_template(chat_template: str | None) -> TextTokenizer:
    """The needle model's tokenizer with another chat template."""
    config = {"bos_token": None, "eos_token": "<|endoftext|>"}
    return TextTokenizer((paths.NEEDLE / "tokenizer.json").read_bytes(), config, chat_template)


NEEDLE = TextTokenizer.open(paths.NEEDLE)
BYTE_IDS = {
    token_bytes(entry)[0]: i for i in range(NEEDLE.vocab_size) if (entry := NEEDLE.id_to_token(i)) and len(entry) == 1
}
SENTENCEPIECE = wrap(with_bos(sentencepiece_like()), bos_token="<s>")
