"""The name of a model on a hub, as `model.path` and the command line take it.

`OWNER/NAME[@REVISION][:FILE.gguf]` is on the Hugging Face Hub; with `modelscope:` before it, on ModelScope.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from protos.errors import UserError

Hub = Literal["huggingface", "modelscope"]
Need = Literal["config", "tokenizer", "weights"]  # what has to be there: the settings, with the tokenizer, all of it
OnProgress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(
    rf"(?P<hub>modelscope:)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>\w[\w./-]{{0,199}}))?(?::(?P<file>\w[\w./-]{{0,199}}))?",
    re.ASCII,
)


class HubError(UserError):
    """A model that a hub does not give: why, and the way out. `problem` is the message without the model's name."""

    def __init__(self, name: object, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.problem = problem


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on a hub. `revision` is a branch, tag or commit, None for the main branch; `file` is a GGUF file of it,
    or its kind such as `Q4_K_M`, None for a folder of safetensors.
    """

    hub: Hub
    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """Return the name that a text is, None for anything else."""
        match = _NAME.fullmatch(text)
        if match is None or ".." in text:
            return None
        return cls("modelscope" if match["hub"] else "huggingface", match["repo"], match["revision"], match["file"])

    def __str__(self) -> str:
        hub = "modelscope:" if self.hub == "modelscope" else ""
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{hub}{self.repo}{revision}" + ("" if self.file is None else f":{self.file}")

    def error(self, problem: str) -> HubError:
        """Return the error of this model."""
        return HubError(self, problem)
