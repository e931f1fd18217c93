"""Which templates can hold a document and a question."""

import pytest

from protos.model.document_prompt import DEFAULT_DOCUMENT_PROMPT, is_document_prompt


@pytest.mark.parametrize(
    ("template", "is_one"),
    [
        (DEFAULT_DOCUMENT_PROMPT, True),
        ("{document}{question}", True),
        ("{{document}} {{question}} {{}}", True),
        ("{question}{document}", False),
        ("{document}", False),
        ("{question}", False),
        ("{document}{question}{question}", False),
        ("{document}{document}{question}", False),
        ("{document}{question", False),
        ("", False),
    ],
)
def test_templates(template: str, is_one: bool) -> None:
    assert is_document_prompt(template) is is_one
