"""Token counts without a running head: by the tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from cluster.config.deployment import load_deployment
from cluster.text.prompts import PromptError
from cluster.text.tokenizer import TextTokenizer


def count_tokens(config: Path, texts: list[bytes]) -> tuple[list[int], int]:
    """Return (tokens of each text as a document has them, longest context in tokens) for the model of a YAML file.

    Raises:
        UserError: the configuration, the checkpoint or its tokenizer cannot be used, or a text is not UTF-8.
    """
    deployment = load_deployment(config)
    tokenizer = TextTokenizer.open(deployment.config.model.path, deployment.config.model.chat_template)
    counts = []
    for text in texts:
        try:
            counts.append(len(tokenizer.encode(text.decode("utf-8"), literal=True)))
        except UnicodeDecodeError as error:
            raise PromptError(f"document: byte 0x{text[error.start]:02x} is not UTF-8") from error
    return counts, deployment.max_model_len
