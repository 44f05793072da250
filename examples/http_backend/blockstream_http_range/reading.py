"""Read files of a web server by ranges, each answer held to the version that was opened.

RFC 9110: ranges, strong ETags, If-Range. RFC 9530: Content-Digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry, Timeout

from blockstream.checkpoint import Checkpoint, header_from
from blockstream.errors import CheckpointError, ConfigError

#: What stands for the checkpoint of a folder, the best first.
STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
#: Answers after which the same request may be well.
BUSY = {408, 425, 429, 500, 502, 503, 504}
MOST_INDEX_NBYTES = 100_000_000


class Remote(NamedTuple):
    """A file as it was when it was opened."""

    url: str
    nbytes: int
    etag: str


class TransientError(Exception):
    """An answer that a second request may mend."""


class HttpRange:
    """The files below `root` as a server has them.

    A `blockstream.plugins.Backend`, and the `blockstream.checkpoint.Source` of what it opens.
    """

    def __init__(self, options):
        self.options = options
        self._files: dict[Path, Remote] = {}
        self._pool = urllib3.PoolManager(
            maxsize=options.connections,
            block=True,
            timeout=Timeout(options.timeout_s),
            retries=Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
        )

    # -- a backend ---------------------------------------------------------------------------

    def checkpoint(self, path):
        """Return the checkpoint of a file or folder below `root`; headers alone are read."""
        if not path.is_relative_to(self.options.root):
            raise ConfigError(
                f"{path} is not below root {self.options.root}, which is what {self.options.url} has; name a "
                "folder there, or leave backend out"
            )
        url = self.options.url + quote(path.relative_to(self.options.root).as_posix())
        if path.suffix == ".safetensors":
            return Checkpoint(path, "safetensors", self._entries(self._open(url)))
        tried = []
        for stem in STEMS:
            for name, opened in ((f"{stem}.index.json", self._sharded), (stem, self._entries)):
                file = self._find(f"{url}/{name}")
                if file is not None:
                    return Checkpoint(path, "safetensors", opened(file))
                tried.append(name)
        raise CheckpointError(f"{url}/: has none of {', '.join(tried)}; check url and root")

    def close(self):
        """Close the connections."""
        self._pool.clear()

    def _entries(self, file):
        place = urlsplit(file.url)
        path = Path(place.netloc + place.path)
        self._files[path] = file
        return header_from(self, path, file.nbytes, file.etag).entries

    def _sharded(self, index):
        """Return the entries of all shards that an index names."""
        if index.nbytes > MOST_INDEX_NBYTES:
            raise CheckpointError(f"{index.url}: has {index.nbytes} bytes and is no index")
        text = bytearray(index.nbytes)
        self._read(index, 0, memoryview(text))
        try:
            where = json.loads(text)["weight_map"]
            shards = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index.url}: is no index of a checkpoint ({error!r})") from error
        entries = {}
        for name in shards:
            if not isinstance(name, str) or "/" in name or name.startswith("."):
                raise CheckpointError(f"{index.url}: names the file {name!r}; shards lie beside their index")
            found = self._entries(self._open(f"{index.url.rpartition('/')[0]}/{quote(name)}"))
            lacking = [n for n, shard in where.items() if shard == name and n not in found]
            if lacking:
                raise CheckpointError(f"{index.url}: places {lacking[0]!r} in {name}, which does not hold it")
            entries |= found
        return entries

    # -- a source ----------------------------------------------------------------------------

    def read(self, file, offset, into):
        """Fill `into` with bytes of an opened file, or raise CheckpointError naming its URL."""
        self._read(self._files[file.path], offset, into)

    def changes(self, file):
        """Return nothing: each answer is held to the version that was opened."""
        return []

    # -- requests ----------------------------------------------------------------------------

    def _find(self, url):
        """Return a file that the server has, None where it answers 404."""
        answer = self._trying(url, lambda: self._ask("HEAD", url))
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise CheckpointError(f"{url}: the server answers {answer.status} {answer.reason or ''}".rstrip())
        etag, nbytes = answer.headers.get("ETag", ""), answer.headers.get("Content-Length", "")
        if not etag or etag.startswith("W/"):
            raise CheckpointError(
                f"{url}: the server sends no strong ETag ({etag or 'none'}): two versions of the file could "
                "not be told apart"
            )
        if not nbytes.isdigit():
            raise CheckpointError(f"{url}: the server does not say how long the file is")
        return Remote(url, int(nbytes), etag)

    def _open(self, url):
        found = self._find(url)
        if found is None:
            raise CheckpointError(f"{url}: the server answers 404, there is no such file; check url and root")
        return found

    def _read(self, file, offset, into):
        if len(into):
            self._trying(file.url, lambda: self._get(file, offset, into))

    def _get(self, file, offset, into):
        """Make one request for a range and check all that the answer says of it."""
        asked = f"bytes {offset}-{offset + len(into) - 1}"
        headers = {
            "Range": asked.replace(" ", "="),
            "If-Range": file.etag,
            "Accept-Encoding": "identity",
            "Want-Content-Digest": "sha-256=1",
        }
        answer = self._ask("GET", file.url, headers)
        try:
            self._check(file, answer, f"{asked}/{file.nbytes}")
            done = 0
            while done < len(into) and (n := answer.readinto(into[done:])):
                done += n
            if done < len(into) or answer.read(1):
                raise TransientError(
                    f"sent {'fewer' if done < len(into) else 'more'} than the {len(into)} bytes asked for"
                )
            self._check_digest(file, answer, into)
        finally:
            answer.close()  # of what was read to its end, the connection is in the pool again
            answer.release_conn()

    def _check(self, file, answer, range_of_file):
        etag, sent = answer.headers.get("ETag"), answer.headers.get("Content-Range")
        if etag != file.etag or answer.status in (404, 410, 412, 416):
            raise CheckpointError(
                f"{file.url}: has changed since it was opened (its ETag was {file.etag} and is {etag}, the "
                f"server answers {answer.status}); start again"
            )
        if answer.status == 200:
            raise CheckpointError(
                f"{file.url}: the server sends no ranges, but the whole file; use one that does"
            )
        if answer.status != 206 or "Content-Encoding" in answer.headers:
            raise CheckpointError(f"{file.url}: the server answers {answer.status} to a range, or encodes it")
        if sent != range_of_file:
            raise TransientError(f"sent the range {sent!r} where {range_of_file!r} was asked for")

    def _check_digest(self, file, answer, into):
        """Compare the bytes with the SHA-256 that the server sends of them."""
        sent = re.search(r"(?:^|[\s,])sha-256=:([A-Za-z0-9+/=]+):", answer.headers.get("Content-Digest", ""))
        if sent is None:
            if self.options.digests == "required":
                raise CheckpointError(
                    f"{file.url}: the server sends no Content-Digest; digests: when-sent does without"
                )
            return
        if base64.b64decode(sent[1]) != hashlib.sha256(into).digest():
            raise TransientError("sent bytes that are not those of its Content-Digest")

    def _ask(self, method, url, headers=None):
        answer = self._pool.request(method, url, headers=headers, preload_content=method == "HEAD")
        if answer.status in BUSY:
            answer.drain_conn()
            raise TransientError(f"answers {answer.status} {answer.reason or ''}".rstrip())
        return answer

    def _trying(self, url, request):
        """Return what a request gives, made again, later each time, while that may mend it."""
        o = self.options
        retry = Retry(total=o.retries, backoff_factor=o.backoff_s / 2, allowed_methods=None)
        while True:
            try:
                return request()
            except (HTTPError, TransientError, OSError) as error:
                try:
                    retry = retry.increment(error=HTTPError(str(error)))
                except (MaxRetryError, HTTPError) as last:
                    said = (
                        f"the server {error}"
                        if isinstance(error, TransientError)
                        else f"{type(error).__name__}: {error}"
                    )
                    raise CheckpointError(
                        f"{url}: {said}, {o.retries + 1} times; check the server, then start again"
                    ) from last
                retry.sleep()
