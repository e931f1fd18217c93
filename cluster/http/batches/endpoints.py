"""What batches can ask for: the requests of other routes, answered as a whole from jobs that have ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.http.core.backend import Backend
from cluster.http.core.errors import ApiError, to_api_error
from cluster.http.core.following import check_outcome
from cluster.http.openai.chat import ChatCompletion
from cluster.http.openai.chat_request import ChatRequest, chat_params, chat_specs
from cluster.http.openai.completions import PARAMS, Choice, Completion, CompletionRequest, completion_specs
from cluster.http.options import RequestModel
from cluster.http.responses.request import ResponsesRequest, response_spec
from cluster.http.responses.response import read_response
from cluster.jobs.model import JobRecord, JobSpec
from cluster.jobs.subscriptions import JobEvent

if TYPE_CHECKING:
    from cluster.jobs.tenants.service import TenantService

_PAGE = 500  # tokens


class EndedJob:
    """A job that has ended, with its tokens as they are stored."""

    def __init__(self, service: TenantService, record: JobRecord) -> None:
        self.record = record
        self.service = service

    async def events(self) -> AsyncIterator[JobEvent]:
        """Yield its tokens."""
        after = 0
        while tokens := self.service.tokens(self.record.id, after, _PAGE):
            after = tokens[-1].number
            yield tokens


@dataclass(frozen=True)
class Endpoint:
    """One route.

    Attributes:
        model: of its requests.
        specs: returns the jobs of a request, of the service as its owner sees it.
        answer: returns the body of its response. Raises ApiError: a job failed.
        params: returns names of fields by the names that messages of the job service begin with.
    """

    model: type[RequestModel]
    specs: Callable[[Backend, Any, TenantService], Sequence[JobSpec]]
    answer: Callable[[Backend, Any, Sequence[EndedJob]], Awaitable[dict[str, Any]]]
    params: Callable[[Any], Mapping[str, str]]

    def error(self, error: Exception, asked: RequestModel | None) -> ApiError:
        """Return an error about a request as its clients see it."""
        return to_api_error(error, self.params(asked) if asked is not None else None)


def _answer_chat(backend: Backend, asked: ChatRequest, jobs: Sequence[EndedJob]) -> Awaitable[dict[str, Any]]:
    return ChatCompletion(backend, asked, jobs).whole()


def _answer_prompts(backend: Backend, asked: CompletionRequest, jobs: Sequence[EndedJob]) -> Awaitable[dict[str, Any]]:
    choices = [Choice(backend, asked, index, job) for index, job in enumerate(jobs)]
    return Completion(backend, asked, choices).whole()


async def _answer_response(backend: Backend, asked: ResponsesRequest, jobs: Sequence[EndedJob]) -> dict[str, Any]:
    (job,) = jobs
    check_outcome(job.record)
    return read_response(job.service, backend, job.record)


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(
        ChatRequest, lambda backend, asked, service: chat_specs(backend, asked, service.documents), _answer_chat,
        chat_params,
    ),
    "/v1/completions": Endpoint(
        CompletionRequest, lambda backend, asked, service: completion_specs(backend, asked), _answer_prompts,
        lambda asked: PARAMS,
    ),
    "/v1/responses": Endpoint(
        ResponsesRequest, lambda backend, asked, service: [response_spec(service, backend, asked)], _answer_response,
        lambda asked: {},
    ),
}  # fmt: skip
