"""Repositories of models: what the libraries of the hubs can do, under one interface, with errors of one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cluster.common.text_format import describe_error
from cluster.hub.cache import cache_folder
from cluster.hub.names import HubError, HubName

_SIGN_IN = "sign in (hf auth login, or HF_TOKEN)"
_SIGN_IN_MODELSCOPE = "give a token (MODELSCOPE_API_TOKEN)"


class Repository(Protocol):
    """One revision of a model on a hub. All methods raise HubError."""

    root: Path  # where its files are kept on this machine

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file."""

    def has(self, file: str) -> bool:
        """Return whether a file is on this machine already."""

    def fetch(self, files: Sequence[str]) -> Path:
        """Download what is missing of some files and return the folder that holds them."""


class HuggingFaceRepository:
    """A repository of the Hugging Face Hub, or of what `HF_ENDPOINT` names."""

    def __init__(self, name: HubName) -> None:
        self._name = name
        self._revision = name.revision or "main"
        self._commit = ""
        self.root = cache_folder(name) / f"models--{name.repo.replace('/', '--')}"

    def sizes(self) -> dict[str, int]:
        from huggingface_hub import HfApi

        with self._errors():
            found = HfApi().model_info(self._name.repo, revision=self._revision, files_metadata=True)
        self._commit = found.sha or ""
        return {each.rfilename: each.size or 0 for each in found.siblings or []}

    def has(self, file: str) -> bool:
        return (self.root / "snapshots" / self._commit / file).is_file()

    def fetch(self, files: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        with self._errors():
            return Path(
                snapshot_download(self._name.repo, revision=self._revision, allow_patterns=[_literal(f) for f in files])
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub import constants, errors

        hub = constants.ENDPOINT
        try:
            yield
        except HubError:
            raise
        except errors.GatedRepoError as error:
            page = f"{hub}/{self._name.repo}"
            problem = f"asks for consent to its terms: give it at {page}, then {_SIGN_IN}"
            raise self._name.error(problem) from error
        except errors.RepositoryNotFoundError as error:
            problem = f"there is no such model on {hub}, or it is private: check the name, or {_SIGN_IN}"
            raise self._name.error(problem) from error
        except errors.RevisionNotFoundError as error:
            raise self._name.error(f"has no revision {self._revision}: name a branch, tag or commit of it") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            hint = f"{_SIGN_IN} with a token that may read it" if status in (401, 403) else "try again later"
            raise self._name.error(f"{hub} answers with HTTP status {status}: {hint}") from error
        except Exception as error:  # of its HTTP library, which differs by version, or of the disk
            raise self._name.error(_unreachable(hub, error, "HF_ENDPOINT")) from error


class ModelScopeRepository:
    """A repository of ModelScope, or of what `MODELSCOPE_ENDPOINT` names."""

    def __init__(self, name: HubName) -> None:
        self._name = name
        self.root = cache_folder(name) / "models" / name.repo.replace("/", "--")
        self._folder = self.root / "snapshots" / (name.revision or "master")
        try:
            from modelscope_hub import HubApi
        except ImportError as error:
            raise name.error("needs a package that is not installed: pip install 'longreach[modelscope]'") from error
        with self._errors():
            endpoint = HubApi().resolve_endpoint_for_read(name.repo)
            self._api = HubApi(endpoint=endpoint)

    def sizes(self) -> dict[str, int]:
        with self._errors():
            found = self._api.list_repo_files(self._name.repo, "model", revision=self._name.revision)
        return {each.path: each.size for each in found if not each.is_dir}

    def has(self, file: str) -> bool:
        return (self._folder / file).is_file()

    def fetch(self, files: Sequence[str]) -> Path:
        with self._errors():
            return Path(
                self._api.download_repo(
                    self._name.repo, "model", revision=self._name.revision, progress_callbacks=[],
                    allow_patterns=[_literal(f) for f in files],
                )
            )  # fmt: skip

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from modelscope_hub import AuthenticationError, NotFoundError, PermissionDeniedError

        hub = "ModelScope"
        try:
            yield
        except HubError:
            raise
        except NotFoundError as error:
            what = f"no such model on {hub}, or no such revision, or it is private"
            raise self._name.error(f"there is {what}: check the name, or {_SIGN_IN_MODELSCOPE}") from error
        except (AuthenticationError, PermissionDeniedError) as error:
            raise self._name.error(f"may not be read: {_SIGN_IN_MODELSCOPE} that may") from error
        except Exception as error:
            raise self._name.error(_unreachable(hub, error, "MODELSCOPE_ENDPOINT")) from error


def open_repository(name: HubName) -> Repository:
    """Return the repository of a model. Raises HubError: the hub's library is not installed."""
    return HuggingFaceRepository(name) if name.hub == "huggingface" else ModelScopeRepository(name)


def _literal(file: str) -> str:
    """Return a pattern of `fnmatch` for one file."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in file)


def _unreachable(hub: str, error: Exception, variable: str) -> str:
    cause = describe_error(error.__cause__ or error)[:200]
    return f"cannot be downloaded from {hub} ({cause}): check the connection and {variable}, then start it again"
