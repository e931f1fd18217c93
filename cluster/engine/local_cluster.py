"""A cluster inside this process, from a YAML file. Importing this loads neither ray nor torch; starting does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.engine.outputs import Generation
    from cluster.engine.request_handle import EngineEvent
    from cluster.engine.runtime import Ask, Session


class LocalCluster:
    """A cluster of one's own: started from a YAML file, asked, stopped.

    >>> with LocalCluster("configs/demo.yaml") as cluster:
    ...     answer = cluster.ask("... a long document ...", "What was decided?")
    ...     print(answer.text)
    """

    def __init__(self, config: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> None:
        """Args: `overrides` has dotted keys over the YAML's, such as `{"model.max_model_len": "128k"}`."""
        self._config = config
        self._overrides = overrides
        self._session: Session | None = None

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the cluster; raises what its parts raise, with nothing left running."""
        from cluster.config.deployment import load_deployment
        from cluster.engine.runtime import Session

        session = Session(load_deployment(self._config, self._overrides))
        session.start()
        self._session = session

    def close(self) -> None:
        """Stop the cluster; may be called twice."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @property
    def session(self) -> Session:
        """The running cluster; raises RuntimeError before `start`."""
        if self._session is None:
            raise RuntimeError("the cluster is not running: use `with LocalCluster(...)` or call start()")
        return self._session

    def ask(
        self, document: str | os.PathLike[str], question: str, ask: Ask | None = None,
        on_event: Callable[[int, EngineEvent], None] | None = None,
    ) -> Generation:  # fmt: skip
        """Answer one question about a document: a text, or the path object of a UTF-8 file."""
        return self.ask_all(document, [question], ask, on_event)[0]

    def ask_all(
        self, document: str | os.PathLike[str], questions: Sequence[str], ask: Ask | None = None,
        on_event: Callable[[int, EngineEvent], None] | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Answer several questions about one document, which is read once; results in their order.

        Args:
            on_event: called with the index of a question and its `PrefillProgress`, `OutputToken` or `Generation`, on
                another thread; must not block.

        Raises:
            PromptError: the document or a question cannot be used. EngineError: the cluster failed.
        """
        from pathlib import Path

        from cluster.engine.runtime import Ask
        from cluster.text.prompts import check_document

        session = self.session
        if not isinstance(document, str):
            data = Path(document).read_bytes()
            document = check_document(data, session.tokenizer, session.deployment.max_model_len)
        return session.ask_document(document, questions, ask or Ask(), on_event)
