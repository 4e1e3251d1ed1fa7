"""The page of runs on 127.0.0.1: two addresses, `/` and `/content`, and no file behind either.

Only this machine can connect. A page of another site could still have the browser ask, under a name of its own that
resolves to 127.0.0.1 (DNS rebinding); its `Host` gives it away and is refused.
"""

import json
import sys
import traceback
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from repflow.monitor.report._follow import Follower
from repflow.monitor.report._page import Content, render_page

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "::1")

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class PageServer(ThreadingHTTPServer):
    """Serves what a `Follower` has.

    Args:
        follower: The runs.
        port: Port on 127.0.0.1; 0 for any that is free.

    Raises:
        OSError: The port is taken, or may not be used.
    """

    daemon_threads = True  # Ctrl-C waits for no browser

    def __init__(self, follower: Follower, port: int) -> None:
        try:
            super().__init__((ADDRESS, port), partial(_Handler, follower))
        except OSError as error:
            raise OSError(
                f"`watch`: cannot listen on port {port} of {ADDRESS}: {error.strerror or error}; choose another port, "
                "or 0 for any that is free"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that went away is no error; anything else is shown, and the server goes on."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "repflow"
    sys_version = ""
    timeout = 60

    def __init__(self, follower: Follower, *connection: Any) -> None:
        self._follower = follower
        super().__init__(*connection)  # answers, and returns when the connection ends

    def do_GET(self) -> None:
        """Answer with the page, or with its content where that has changed."""
        if not _is_local(self.headers.get("Host", "")):
            self._answer(HTTPStatus.FORBIDDEN, f"expected a Host of this machine, one of {', '.join(HOSTS)}\n")
            return
        path = urlsplit(self.path).path
        if path not in ("/", "/content"):
            self._answer(HTTPStatus.NOT_FOUND, "there is only / here\n")
            return
        try:
            version, content = self._follower.current()
        except Exception:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "the runs could not be shown; the terminal says why\n")
            raise
        if path == "/":
            self._answer(HTTPStatus.OK, render_page(content, version=version), "text/html; charset=utf-8")
        elif self.headers.get("If-None-Match") == version:
            self._answer(HTTPStatus.NOT_MODIFIED)
        else:
            self._answer(HTTPStatus.OK, _content_json(version, content), "application/json")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, text: str = "", kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are no news for the terminal."""


def _is_local(host: str) -> bool:
    """Whether a `Host`, with any port (a tunnel may have another), names this machine."""
    try:
        return urlsplit(f"//{host}").hostname in HOSTS
    except ValueError:
        return False


def _content_json(version: str, content: Content) -> str:
    head = json.dumps({"version": version, "title": content.title, "body": content.body})
    return f'{head[:-1]},"data":{content.data}}}'
