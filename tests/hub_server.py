"""
A Hub on the loopback interface: as much of its protocol as the `huggingface_hub` client needs to find, download and
upload models, with faults on request. Everything is kept in memory, and every request is logged.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repository:
    """Commits by hash, each a `{path: content}`, and branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add `files` to a branch; returns the hash."""
        files = dict(self.commits.get(self.branches.get(branch, ""), {})) | files
        parts = [self.branches.get(branch, ""), message, *(path + git_hash(c) for path, c in sorted(files.items()))]
        name = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """
    Context manager that serves `repositories` at `endpoint`.

    Attributes:
        log (`list[tuple[str, str, dict]]`): method, path and headers of every request.
        status (`int`, *optional*): answer every request with it.
        cut (`dict[str, int]`): end the next download of a path after so many bytes.
        change (`dict[str, Callable]`): what is done to the bytes of a path on their way out.
    """

    def __init__(self, token: str = "hf_secret", page: int = 2):
        self.token, self.page = token, page
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str, dict]] = []
        self.status: int | None = None
        self.cut: dict[str, int] = {}
        self.change: dict = {}
        self.connections: list[socket.socket] = []

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub, self._server.daemon_threads = self, True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # large files lie at another host
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and what is connected to it; later requests find nobody."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for, in order."""
        found = [re.search("(?:/resolve/|^/cdn/)[^/]+/(.*)", path) for method, path, _ in self.log if method == "GET"]
        return [match[1] for match in found if match]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.hub.connections.append(self.connection)

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self, status: int, content=b"", headers: dict | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _handle(self) -> None:
        self.hub: HubServer = self.server.hub
        url = urlsplit(self.path)
        self.parts, self.query = [unquote(part) for part in url.path.strip("/").split("/")], parse_qs(url.query)
        self.body = self._read_body()
        self.hub.log.append((self.command, unquote(url.path), dict(self.headers)))
        self.known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.status is not None:
            return self._answer(self.hub.status, {"error": "out of order"})
        for method, pattern, action in _ROUTES:
            if method == self.command or (method == "GET" and self.command == "HEAD"):
                found = _match(pattern, self.parts)
                if found is not None:
                    return action(self, **found)
        self._answer(404)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _repository(self, repo: str, writing: bool = False) -> Repository | None:
        """The repository, unless it is refused, which has then been answered."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.known):
            self._refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
        elif found.gated and not self.known:
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif writing and not self.known:
            self._refuse(403, "", "You are not allowed to write here")
        else:
            return found
        return None

    def _commit_of(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        repository = self._repository(repo)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def info(self, repo: str, revision: str = "main") -> None:
        if found := self._commit_of(repo, revision):
            files = found[0].commits[found[1]]
            self._answer(200, {"id": repo, "sha": found[1], "siblings": [{"rfilename": path} for path in files]})

    def tree(self, repo: str, revision: str) -> None:
        if found := self._commit_of(repo, revision):
            entries = []
            for path, content in sorted(found[0].commits[found[1]].items()):
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                if path.endswith(LFS_SUFFIXES):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self._page(entries)

    def _page(self, entries: list) -> None:
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(entries):
            query = "&".join(f"{key}={quote(v)}" for key, vs in self.query.items() if key != "cursor" for v in vs)
            path = quote("/".join(self.parts))
            headers["Link"] = f'<{self.hub.endpoint}/{path}?{query}&cursor={start + self.hub.page}>; rel="next"'
        self._answer(200, entries[start : start + self.hub.page], headers)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not (found := self._commit_of(repo, revision)):
            return
        content = found[0].commits[found[1]].get(path)
        headers = {"X-Repo-Commit": found[1]}
        if content is None:
            return self._answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        if not path.endswith(LFS_SUFFIXES):
            return self._send(path, content, headers | {"ETag": f'"{git_hash(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        self.hub.objects[digest] = content
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._answer(302, b"", headers | {"Location": quote(f"{self.hub.storage}/cdn/{digest}/{path}", ":/")})

    def cdn(self, oid: str, path: str) -> None:
        self._send(path, self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _send(self, path: str, content: bytes, headers: dict) -> None:
        """Send a file, or the rest of it that is asked for, or what the faults make of it."""
        getting, status, start = self.command == "GET", 200, 0
        content = self.hub.change[path](content) if getting and path in self.hub.change else content
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        content = content[start:]
        if getting and path in self.hub.cut:
            headers["Content-Length"] = str(len(content))
            content, self.close_connection = content[: self.hub.cut.pop(path)], True
        self._answer(status, content, headers | {"Accept-Ranges": "bytes"})

    def models(self) -> None:
        wanted, entries = self.query.get("filter", []), []
        for repo, repository in self.hub.repositories.items():
            if repository.private and not self.known:
                continue
            card = repository.commits.get(repository.branches.get("main", ""), {}).get("README.md", b"").decode()
            data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
            if all(tag in data.get("tags", []) for tag in wanted):
                entries.append({"id": repo, "tags": data.get("tags", []), "cardData": data})
        self._page(entries)

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if not self.known:
            return self._refuse(401, "", "Invalid username or password.")
        if repo in self.hub.repositories:
            return self._answer(
                409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"}
            )
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(private=bool(private))
        self.hub.repositories[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        self._answer(200, {"url": f"{self.hub.endpoint}/{repo}"})

    def validate_yaml(self) -> None:
        data = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        good = isinstance(data, dict) and isinstance(data.get("license"), str) and isinstance(data.get("tags"), list)
        self._answer(200 if good else 400, {"errors": [] if good else [{"message": "bad metadata"}], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if self._repository(repo, writing=True):
            if not (found := self._commit_of(repo, revision)):
                return
            files = []
            for asked in json.loads(self.body)["files"]:
                there = found[0].commits[found[1]].get(asked["path"])
                mode = "lfs" if asked["path"].endswith(LFS_SUFFIXES) else "regular"
                oid = (
                    None if there is None else hashlib.sha256(there).hexdigest() if mode == "lfs" else git_hash(there)
                )
                files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer(200, {"files": files})

    def lfs_batch(self, repo: str) -> None:
        if self._repository(repo.removesuffix(".git"), writing=True):
            objects = []
            for asked in json.loads(self.body)["objects"]:
                upload = {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}
                there = asked["oid"] in self.hub.objects
                objects.append(asked if there else asked | {"actions": {"upload": upload}})
            self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "content does not match its oid"})
        self.hub.objects[oid] = self.body
        self._answer(200)

    def commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, writing=True)
        if repository is None:
            return
        lines, files = [json.loads(line) for line in self.body.splitlines()], {}
        for line in lines[1:]:
            value = line["value"]
            lfs = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
        pull = "create_pr" in self.query
        branch = f"refs/pr/{len(repository.branches)}" if pull else revision
        if pull:
            repository.branches[branch] = repository.branches["main"]
        name = repository.commit(files, branch, lines[0]["value"]["summary"])
        url = f"{self.hub.endpoint}/{repo}"
        answer = {"commitUrl": f"{url}/commit/{name}", "commitOid": name, "success": True}
        self._answer(200, answer | ({"pullRequestUrl": f"{url}/discussions/1"} if pull else {}))


def _match(pattern: str, parts: list[str]) -> dict[str, str] | None:
    """The named parts of a path like `api/models/{repo}`; a repo takes two parts, a path all that are left."""
    found, parts = {}, list(parts)
    for wanted in pattern.split("/"):
        if wanted == "{path}":
            found["path"], parts = "/".join(parts), []
        elif wanted == "{repo}" and len(parts) >= 2:
            found["repo"], parts = "/".join(parts[:2]), parts[2:]
        elif wanted.startswith("{") and parts:
            found[wanted[1:-1]] = parts.pop(0)
        elif not parts or parts.pop(0) != wanted:
            return None
    return None if parts else found


_ROUTES = [
    ("GET", "api/models", _Handler.models),
    ("GET", "api/models/{repo}", _Handler.info),
    ("GET", "api/models/{repo}/revision/{revision}", _Handler.info),
    ("GET", "api/models/{repo}/tree/{revision}", _Handler.tree),
    ("POST", "api/repos/create", _Handler.create),
    ("POST", "api/validate-yaml", _Handler.validate_yaml),
    ("POST", "api/models/{repo}/preupload/{revision}", _Handler.preupload),
    ("POST", "api/models/{repo}/commit/{revision}", _Handler.commit),
    ("POST", "{repo}/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "lfs/{oid}", _Handler.lfs_put),
    ("GET", "cdn/{oid}/{path}", _Handler.cdn),
    ("GET", "{repo}/resolve/{revision}/{path}", _Handler.resolve),
]
