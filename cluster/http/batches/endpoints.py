"""What batches can ask for: the requests of other routes, answered as a whole from jobs that have ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.http.core.backend import Backend
from cluster.http.core.errors import ApiError, to_api_error
from cluster.http.core.following import JobEvents
from cluster.http.files.attachments import Documents
from cluster.http.openai.chat import ChatChunks
from cluster.http.openai.chat_request import ChatRequest, chat_params, chat_spec
from cluster.http.openai.completions import PARAMS, Choice, Completion, CompletionRequest, completion_specs
from cluster.http.options import RequestModel
from cluster.jobs.model import JobRecord, JobSpec
from cluster.jobs.subscriptions import JobEvent

if TYPE_CHECKING:
    from cluster.jobs.service import JobService

_PAGE = 500  # tokens


class EndedJob:
    """A job that has ended, with its tokens as they are stored."""

    def __init__(self, service: JobService, record: JobRecord) -> None:
        self.record = record
        self._service = service

    async def events(self) -> AsyncIterator[JobEvent]:
        """Yield its tokens."""
        after = 0
        while tokens := self._service.tokens(self.record.id, after, _PAGE):
            after = tokens[-1].number
            yield tokens


@dataclass(frozen=True)
class Endpoint:
    """One route.

    Attributes:
        model: of its requests.
        specs: returns the jobs of a request.
        answer: returns the body of its response. Raises ApiError: a job failed.
        params: returns names of fields by the names that messages of the job service begin with.
    """

    model: type[RequestModel]
    specs: Callable[[Backend, Any, Documents], Sequence[JobSpec]]
    answer: Callable[[Backend, Any, Sequence[JobEvents]], Awaitable[dict[str, Any]]]
    params: Callable[[Any], Mapping[str, str]]

    def error(self, error: Exception, asked: RequestModel | None) -> ApiError:
        """Return an error about a request as its clients see it."""
        return to_api_error(error, self.params(asked) if asked is not None else None)


def _answer_chat(backend: Backend, asked: ChatRequest, jobs: Sequence[JobEvents]) -> Awaitable[dict[str, Any]]:
    (job,) = jobs
    return ChatChunks(backend, asked, job).whole()


def _answer_prompts(backend: Backend, asked: CompletionRequest, jobs: Sequence[JobEvents]) -> Awaitable[dict[str, Any]]:
    choices = [Choice(backend, asked, index, job) for index, job in enumerate(jobs)]
    return Completion(backend, asked, choices).whole()


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(
        ChatRequest, lambda backend, asked, documents: [chat_spec(backend, asked, documents)], _answer_chat, chat_params
    ),
    "/v1/completions": Endpoint(
        CompletionRequest, lambda backend, asked, documents: completion_specs(backend, asked), _answer_prompts,
        lambda asked: PARAMS,
    ),
}  # fmt: skip
