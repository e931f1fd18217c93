"""The template that makes one message of a document and a question."""

from __future__ import annotations

DEFAULT_DOCUMENT_PROMPT = "{document}\nQuestion: {question}"


def is_document_prompt(template: str) -> bool:
    """Return whether `template` has `{document}` once and, after it, `{question}` once."""
    once = template.count("{document}") == template.count("{question}") == 1
    return once and template.index("{document}") < template.index("{question}")
