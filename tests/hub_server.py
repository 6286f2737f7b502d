"""A small server with the part of the Hugging Face hub's HTTP that huggingface_hub calls for `cappy push` and `cappy pull`.

Repositories are in memory. Large files end in .parquet, .safetensors or .bin, or have 100 kB or more. They are uploaded first, and a
commit refers to them by their SHA-256. The server has no Xet storage (`HF_HUB_DISABLE_XET=1`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_testwritetoken000000000000000000"
READ_TOKEN = "hf_testreadtoken0000000000000000000"
_LARGE = (".parquet", ".safetensors", ".bin")


@dataclass
class Repository:
    """Commits as whole trees: path -> bytes."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def add_commit(self, branch: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server. `repositories` has keys such as `datasets/owner/name` and `models/owner/name`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        """Method and path of each request."""
        self.before_upload = threading.Semaphore(10**6)
        """Each upload of a large file takes one; a test with few stops the uploads after them."""
        self.damage: dict[str, int] = {}
        """Path -> how many of its next downloads have a flipped byte."""
        self.fail: dict[str, tuple[int, str]] = {}
        """Part of a request's path -> status and error code of its answer."""

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repositories[repository]
        return found.commits[found.branches[branch]]


@contextmanager
def serve():
    """Run a hub in a thread of this process; yield it."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.before_upload.release(10**6)
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for part, (status, code) in self.server.fail.items():
            if part in path:
                return self._error(status, code)
        if path.startswith("/objects/"):  # a signed URL, which needs no token
            return self._upload(path.removeprefix("/objects/"), body)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.can_read, self.can_write = token in (TOKEN, READ_TOKEN), token == TOKEN
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                kind = match["kind"].rstrip("/") or "models"
                found = self.server.repositories.get(f"{kind}/{match['name']}")
                if found is None or (found.private and not self.can_read):
                    return self._error(401, "RepoNotFound")
                return answer(self, found, match, body)
        return self._error(404, "")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: Any, status: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._bytes(b"{}", status, {"X-Error-Code": code} if code else {})

    def _bytes(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, asked: dict[str, Any]) -> None:
        if not self.can_write:
            return self._error(403 if self.can_read else 401, "")
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        there = f"{kind}/{name}" in self.server.repositories
        if not there:
            made = self.server.repositories[f"{kind}/{name}"] = Repository(private=asked.get("visibility") == "private")
            made.add_commit("main", {".gitattributes": b"*.parquet filter=lfs\n"})
        return self._json({"url": url, "name": name}, 409 if there else 200)

    def _info(self, found: Repository, match: re.Match[str], body: bytes) -> None:
        sha = found.find(match["revision"] or "main")
        if sha is None:
            return self._error(404, "RevisionNotFound")
        return self._json({"id": match["name"], "sha": sha, "private": found.private})

    def _tree(self, found: Repository, match: re.Match[str], body: bytes) -> None:
        tree = found.commits[found.find(match["revision"]) or ""]
        folder = f"{match['path']}/" if match["path"] else ""
        files = {path: data for path, data in tree.items() if path.startswith(folder)}
        return self._json([_entry(path, data) for path, data in files.items()]) if files else self._error(404, "EntryNotFound")

    def _preupload(self, found: Repository, match: re.Match[str], body: bytes) -> None:
        if not self.can_write:
            return self._error(403, "")
        tree = found.commits[found.branches[match["revision"]]]
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if _is_large(each["path"], each["size"]) else "regular",
                "shouldIgnore": False,
                "oid": _entry(each["path"], tree[each["path"]])["oid"] if each["path"] in tree else None,
            }
            for each in json.loads(body)["files"]
        ]
        return self._json({"files": files})

    def _lfs(self, found: Repository, match: re.Match[str], body: bytes) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/objects/{each['oid']}?X-Amz-Signature=secretsignature"}}}
            if each["oid"] not in self.server.objects
            else each
            for each in json.loads(body)["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> None:
        self.server.before_upload.acquire()
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "")
        self.server.objects[oid] = body
        return self._json({})

    def _commit(self, found: Repository, match: re.Match[str], body: bytes) -> None:
        if not self.can_write:
            return self._error(403, "")
        tree = dict(found.commits[found.branches[match["revision"]]])
        for line in body.splitlines():
            key, value = (part := json.loads(line))["key"], part["value"]
            if key == "header" and value.get("parentCommit", found.branches[match["revision"]]) != found.branches[match["revision"]]:
                return self._error(412, "")
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                tree[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        sha = found.add_commit(match["revision"], tree)
        return self._json({"commitUrl": f"{self.server.url}/{match['name']}/commit/{sha}", "commitOid": sha, "success": True})

    def _branch(self, found: Repository, match: re.Match[str], body: bytes) -> None:
        found.branches[match["revision"]] = found.branches["main"]
        return self._json({})

    def _resolve(self, found: Repository, match: re.Match[str], body: bytes) -> None:
        sha = found.find(match["revision"])
        if sha is None or match["path"] not in found.commits[sha]:
            return self._error(404, "EntryNotFound" if sha else "RevisionNotFound")
        data = found.commits[sha][match["path"]]
        entry = _entry(match["path"], data)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"'}
        if self.command == "GET" and self.server.damage.get(match["path"], 0) > 0:
            self.server.damage[match["path"]] -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        return self._bytes(data, 200, headers)


def _is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(_LARGE) or size >= 100_000)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
    return {"type": "file", "path": path, "size": len(data), "oid": oid, **(large if _is_large(path, len(data)) else {})}


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_PAGE = r"/(?P<kind>datasets/|)(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    (rf"{_API}(?:/revision/(?P<revision>.+))?", _Handler._info),
    (rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler._tree),
    (rf"{_API}/preupload/(?P<revision>.+)", _Handler._preupload),
    (rf"{_API}/commit/(?P<revision>.+)", _Handler._commit),
    (rf"{_API}/branch/(?P<revision>.+)", _Handler._branch),
    (rf"{_PAGE}\.git/info/lfs/objects/batch", _Handler._lfs),
    (rf"{_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
]
