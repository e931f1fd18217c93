"""A program that takes the options of llama-server and answers as it does: `make_program` writes one."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


def make_program(folder: Path) -> Path:
    """Write an executable file that runs this module; what it is asked goes to `folder/asked.jsonl`."""
    path = folder / "llama-server"
    asked = folder / "asked.jsonl"
    path.write_text(f"#!/bin/sh\nPYTHONPATH='{ROOT}' exec '{sys.executable}' -m {__name__} '{asked}' \"$@\"\n")
    path.chmod(0o755)
    return path


def main(arguments: list[str]) -> None:
    asked, *rest = arguments
    if rest == ["--version"]:
        print("version: 0.0.1 (fake)", file=sys.stderr)
        return
    parser = ArgumentParser()
    for option in ("-m", "-c", "-t", "-np", "--host", "--port", "-fa"):
        parser.add_argument(option)
    options = parser.parse_args(rest)
    if not Path(options.m).is_file():
        sys.exit(f"error: {options.m}: no such file")
    with Path(asked).open("a") as log:
        print(json.dumps(vars(options)), file=log)
    ThreadingHTTPServer((options.host, int(options.port)), handler(Path(asked))).serve_forever()


def handler(asked: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer("application/json", json.dumps({"data": [{"id": "model.gguf"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with asked.open("a") as log:
                print(json.dumps({"prompt": len(body["prompt"]), "max_tokens": body["max_tokens"]}), file=log)
            pieces = [{"choices": [{"text": " a", "finish_reason": None}]} for _ in range(body["max_tokens"])]
            end = {"choices": [{"text": "", "finish_reason": "length"}]}
            usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
            lines = [f"data: {json.dumps(event)}\n\n" for event in (*pieces, end, usage)]
            self._answer("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode())

        def _answer(self, kind: str, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


if __name__ == "__main__":
    main(sys.argv[1:])
