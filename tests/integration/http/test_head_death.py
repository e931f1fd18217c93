"""The head is killed again and again during a response in the background: no event is lost, none comes twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.rigs.background import BackgroundReader, die_again_and_again, read_to_end
from tests.support.rigs.head import HeadProcess, free_port

LIVES = (2, 20, 20, 20, 20)  # events between deaths; the first comes before the prompt is read
BODY: dict[str, Any] = {
    "input": "The code of dark river is 12345. " * 150 + "What is the code?",  # a prompt of some steps
    "max_output_tokens": 600,
    "background": True,
    "extra_body": {"ignore_eos": True},
}


@pytest.mark.slow
def test_five_deaths_of_the_head(tmp_path: Path) -> None:
    port = free_port()
    with (
        HeadProcess(tmp_path, server=f"  http_port: {port}") as head,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=3, timeout=120) as client,
    ):

        def restart() -> None:
            head.kill()
            head.start()

        made = client.responses.create(**BODY)
        reader = BackgroundReader(client, made.id)
        die_again_and_again(reader, restart, LIVES)
        undisturbed = BackgroundReader(client, client.responses.create(**BODY).id)  # beside what is left of the other
        read_to_end(reader)
        reader.check()
        undisturbed.read()
        undisturbed.check()
        with head.client() as jobs:
            assert jobs.job(made.id.replace("resp_", "job_")).data.restarts >= len(LIVES) - 1  # it ran when they died
        assert reader.text == undisturbed.text
        assert [event["type"] for event in reader.events] == [event["type"] for event in undisturbed.events]
        again = BackgroundReader(client, made.id)
        again.read()
        assert again.events == reader.events
        response = client.responses.retrieve(made.id)
        assert response.to_dict() == reader.events[-1]["response"]
        assert response.output_text == undisturbed.text
