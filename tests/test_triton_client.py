"""The client without a server: what it waits for."""

import inspect
import queue
import sys

import pytest

from triton_models import client, requests, serve
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
    given = inspect.signature(client.Client).parameters["timeout_s"].default
    assert requests.Limits.timeout_s < given < 2 * requests.Limits.timeout_s


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--height", "99999999999"),
            "--height 99999999999: expected a number, 2147483647 at most",
        ),
        (("--guidance_scale", "1e39"), "--guidance_scale 1e+39: expected a number, 3.40"),
        (("--output-file", "no/such/x.png"), "the folder no/such does not exist"),
        (("--output-file", "x.jpg"), "expected a name ending in .png"),
    ],
)
def test_what_no_request_can_say_is_refused(flags, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["client", "--prompt", "a", *flags])
    with pytest.raises(UserError) as refusal:
        client.main()
    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--batch-sizes", "1,\u00b2"), "--batch-sizes 1,\u00b2: expected numbers, 1 among them"),
        (("--write-repository", "/proc/x"), "the folder /proc cannot be written"),
        (("--log", "/proc/x"), "--log /proc/x: the folder /proc cannot be written"),
        (("--watch", "inf"), "--watch inf: expected 0.1 to 86400"),
        (("--timeout", "nan"), "--timeout nan: expected 1 to 86400"),
        (("--http_port", "8500", "--grpc_port", "8500"), "found one port twice, expected three"),
    ],
)
def test_what_no_server_can_do_is_refused(flags, expected):
    assert expected in "\n".join(serve.problems_of(serve.parse_args(list(flags))[0]))
