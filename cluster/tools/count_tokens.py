"""Token counts without a running head: by the tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from cluster.config.deployment import load_deployment
from cluster.text.prompts import decode_document, document_place
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.limits import MAX_UINT32


def count_tokens(config: Path, texts: list[bytes]) -> tuple[list[int], int]:
    """Return (tokens of each text as a document has them, longest context in tokens) for the model of a YAML file.

    Raises:
        UserError: the configuration, the checkpoint, its tokenizer or chat template cannot be used, or a text is empty
            or not UTF-8.
    """
    deployment = load_deployment(config, need="tokenizer")
    model = deployment.config.model
    tokenizer = TextTokenizer.open(model.path, model.chat_template)
    place = document_place(tokenizer, model.document_prompt)
    counts = [len(tokenizer.encode_literal(decode_document(text), place, MAX_UINT32)) for text in texts]
    return counts, deployment.max_model_len
