"""A head over the demo model that serves HTTP, and objects on it that requests can be about."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.bench.faults.rig import FaultHead, free_port, merged
from cluster.bench.head_process import until
from cluster.bench.http.recorded import BATCH_LINE

_UNFINISHED = ("queued", "prefilling", "decoding", "recovering")
_CALL_S = 60.0


class HttpHead(FaultHead):
    """A head of one stage with a port for HTTP."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.http_port = free_port()
        sections = merged({"server": {"http_port": self.http_port}}, sections)
        super().__init__(folder, 1, 1, **sections)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"


def make_objects(url: str) -> dict[str, str]:
    """Return ids, by kind, of objects that are made for requests to be about."""
    with httpx.Client(base_url=url, timeout=_CALL_S) as client:

        def made(path: str, **sent: Any) -> str:
            answer = client.post(path, **sent)
            if answer.status_code != 200:
                raise RuntimeError(f"POST {path}: {answer.status_code}: {answer.text[:300]}")
            return str(answer.json()["id"])

        def file(purpose: str, content: bytes) -> str:
            return made("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": purpose})

        lines = file("batch", json.dumps(BATCH_LINE).encode())
        return {
            "document": made("/v1/documents", content=b"The code of dark river is 4711."),
            "file": file("user_data", b"The code of dark river is 4711."),
            "lines": lines,
            "batch": made("/v1/batches", json={"input_file_id": lines, "endpoint": BATCH_LINE["url"]}),
            "job": made("/v1/jobs", json={"prompt": "hi", "max_tokens": 2}),
            "response": made("/v1/responses", json={"input": "hi", "max_output_tokens": 2}),
            "model": str(client.get("/v1/models").json()["data"][0]["id"]),
        }


def cancel_all(url: str) -> int:
    """Cancel the jobs and batches that have not ended; returns how many jobs there were."""
    count = 0
    with httpx.Client(base_url=url, timeout=_CALL_S) as client:
        for batch in client.get("/v1/batches", params={"limit": 100}).json()["data"]:
            if batch["status"] in ("validating", "in_progress"):
                client.post(f"/v1/batches/{batch['id']}/cancel")
        while found := client.get("/v1/jobs", params={"state": list(_UNFINISHED)}).json()["jobs"]:
            count += len(found)
            for job in found:
                client.post(f"/v1/jobs/{job['id']}/cancel")
    return count


def what_is_left(url: str, pid: int) -> list[str]:
    """Return what an idle head should not have: jobs, pages, connections or a problem."""
    port = int(url.rpartition(":")[2])
    with httpx.Client(base_url=url, timeout=_CALL_S, headers={"Connection": "close"}) as client:
        status = client.get("/v1/cluster").json()
    left = [f"{name}: {status[name]}" for name in ("queued", "running", "kv_usage", "problem") if status[name]]
    connections = psutil.Process(pid).net_connections("tcp")
    states = [one.status for one in connections if one.laddr and one.laddr.port == port and one.raddr]
    if open_ones := [state for state in states if state != psutil.CONN_TIME_WAIT]:
        left.append(f"connections: {len(open_ones)}")
    return left


def wait_until_idle(url: str, pid: int, within_s: float = 120.0) -> float:
    """Return the seconds after which nothing was left. Raises TimeoutError naming what is."""
    began = time.monotonic()
    left: list[str] = []

    def is_idle() -> bool:
        left[:] = what_is_left(url, pid)
        return not left

    try:
        until(is_idle, "an idle head", within_s)
    except TimeoutError as error:
        raise TimeoutError(f"still there after {within_s:g} s: {'; '.join(left)}") from error
    return round(time.monotonic() - began, 2)


def ask(url: str) -> str:
    """Return a short answer, the same every time."""
    body = {"prompt": "The code of dark river is", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=_CALL_S)
    return str(answer.raise_for_status().json()["choices"][0]["text"])
