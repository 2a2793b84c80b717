"""A model hub in a thread: the endpoint that huggingface_hub downloads from, over real HTTP."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(SimpleHTTPRequestHandler):
    """Serve DIR/ORG/NAME/FILE as /ORG/NAME/resolve/main/FILE, with the headers of a hub."""

    def translate_path(self, path: str) -> str:
        """Find a file; whatever is no resolve address is not there."""
        self.server.asked.append(path)
        org, name, kind, _, *rest = path.strip("/").split("/")
        self.found = Path(self.directory, org, name, *rest)
        return str(self.found if kind == "resolve" else self.found / "nothing")

    def end_headers(self) -> None:
        """Say which commit and content it is; a hub's file has both."""
        if self.found.is_file():
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(self.found.read_bytes()).hexdigest()}"')
        super().end_headers()

    def log_message(self, *_) -> None:
        """Keep quiet."""


@contextmanager
def serving(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve a folder; `asked` lists what was asked for, `address` is the hub's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.asked = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
