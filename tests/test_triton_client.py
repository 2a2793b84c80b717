"""The client without a server: what it waits for."""

import inspect
import queue
import sys

import pytest

from triton_models import client, requests
from utils.errors import UserError


class Silent:
    """A connection to a server whose orchestrator was killed amid the request."""

    def __init__(self, port: int, host: str) -> None: ...

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *error) -> None: ...

    def generate(self, **fields) -> list:
        raise queue.Empty


def test_a_server_that_never_answers_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(client, "Client", Silent)
    words = ["client", "--prompt", "a", "--output-file", str(tmp_path / "x.png")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="no answer within 660 s; ask again"):
        client.main()


def test_no_answer_is_waited_for_longer_than_the_server_may_take():
    for call in (client.Client.generate, client.Client.responses):
        given = inspect.signature(call).parameters["timeout_s"].default
        assert requests.Limits.timeout_s < given < 2 * requests.Limits.timeout_s
