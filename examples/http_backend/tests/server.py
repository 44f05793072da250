"""A web server on 127.0.0.1 that sends ranges of files in memory, and fails where it is told to."""

import base64
import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`files`: path -> bytes. `faults`: what the next answers to GET do wrong, one each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {}, [], []
        self.digests, self.weak, self.ranges = True, False, True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        """Say nothing of clients that leave early: that is what some of them are to do."""

    def etag(self, data):
        return ("W/" if self.weak else "") + f'"{hashlib.sha256(data).hexdigest()[:16]}"'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Say nothing."""

    def do_HEAD(self):
        data = self.server.files.get(self.path)
        if data is None:
            self.answer(404)
        else:
            self.answer(200, {"ETag": self.server.etag(data)}, length=len(data))

    def do_GET(self):
        server = self.server
        data = server.files.get(self.path)
        server.asked.append((self.path, self.headers["Range"]))
        fault = server.faults.pop(0) if server.faults else None
        if data is None:
            return self.answer(404)
        if isinstance(fault, int):
            return self.answer(fault, {"Retry-After": "0"})
        etag = server.etag(data)
        if not server.ranges or self.headers["If-Range"] != etag:
            return self.answer(200, {"ETag": etag}, data)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        body = data[first : last + 1]
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {"ETag": etag, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        if server.digests:
            headers["Content-Digest"] = f"sha-256=:{digest}:"
        if fault == "other range":
            headers["Content-Range"] = f"bytes {first + 1}-{last + 1}/{len(data)}"
        if fault == "other bytes":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "half":
            self.answer(206, headers, body[: len(body) // 2], length=len(body))
            self.close_connection = True
            return None
        return self.answer(206, headers, body)

    def answer(self, status, headers=None, body=b"", length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving():
    """Run a server in a thread for the length of the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
