"""Samples as token ids: the chat template around the prompt, and behind it the answer prefix."""

from __future__ import annotations

import secrets

from cluster.text.chat_template import render_user_message
from cluster.text.prompts import PromptError
from cluster.text.reasoning import opens_reasoning
from cluster.text.tokenizer import TextPart, TextTokenizer
from cluster.tools.eval.ruler.sample import Sample


class PromptMaker:
    """Encodes the samples of one checkpoint."""

    def __init__(self, tokenizer: TextTokenizer, enable_thinking: bool | None) -> None:
        """Render the chat template once. Raises PromptError: an answer cannot be begun with this template."""
        mark = f"[sample {secrets.token_hex(16)}]"
        parts = render_user_message(tokenizer, mark, enable_thinking).split(mark)
        if len(parts) != 2:
            problem = f"shows the user message {len(parts) - 1} times: must show it exactly once"
            raise PromptError(f"chat_template: {problem}")
        self._tokenizer = tokenizer
        self._head, self._tail = parts
        if opens_reasoning(tokenizer, self.encode(Sample("x", "", ("x",)))):
            raise PromptError("chat_template: opens <think>, where no answer can be begun: use --no-thinking")

    def encode(self, sample: Sample) -> list[int]:
        """Return the ids of a prompt. Added tokens spelt in the sample are ordinary text."""
        parts = [TextPart(self._head), TextPart(sample.input, literal=True)]
        parts.append(TextPart(self._tail + sample.answer_prefix))
        return self._tokenizer.encode_parts(parts, add_special=self._tokenizer.chat_template is None)

    def count(self, sample: Sample) -> int:
        """Return the tokens of a prompt."""
        return len(self.encode(sample))
