"""A stand-in for the Hub on 127.0.0.1: repositories in memory, files as git blobs or through LFS, faults on request.

Only what huggingface_hub calls to create a repository, commit and read back. A commit is applied whole or not at all.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "hf_" + "stand" * 6


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" holds `where`.

    `kind`: an HTTP status, "hang" (no answer), "cut" (the connection breaks before an answer) or "lost" (the request
    takes effect, its answer never arrives).
    """

    where: str
    kind: int | str
    times: int = 1
    headers: dict = field(default_factory=dict)


class Hub:
    def __init__(self):
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}  # name -> [(commit, path -> content)]
        self.objects: dict[str, bytes] = {}  # LFS
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.between = None  # called once, when a commit arrives: another push that comes first
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def create(self, name):
        self.repos[name] = [(hashlib.sha1(name.encode()).hexdigest(), {".gitattributes": b""})]

    def files(self, name) -> dict[str, bytes]:
        return self.repos[name][-1][1]

    def commit(self, name, changes):
        files = {**self.files(name), **changes}
        self.repos[name].append((hashlib.sha1(f"{name}{len(self.repos[name])}".encode()).hexdigest(), files))
        return self.repos[name][-1][0]

    def fault(self, request) -> Fault | None:
        for fault in self.faults:
            if fault.where in request and fault.times > 0:
                fault.times -= 1
                return fault
        return None


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def _serve(self):
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.fault(request)
        if fault is not None and fault.kind == "hang":
            self.hub.released.wait(20)
        if fault is not None and fault.kind in ("hang", "cut"):
            return self._cut()
        if fault is not None and fault.kind != "lost":
            # A real server could repeat what it was sent; the client's texts must not pass that on.
            error = {"error": f"refused {self.headers.get('Authorization')}"}
            return self._json(error, fault.kind, fault.headers)
        answer = self._route(request, body)
        if fault is not None:
            return self._cut()
        return self._bytes(*answer) if isinstance(answer[1], bytes) else self._json(*answer)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, value, status=200, headers=()):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in dict(headers).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _bytes(self, commit, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{git_oid(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, request, body):
        hub = self.hub
        if "/objects/" in request and self.command == "PUT":
            hub.objects[self.path.rpartition("/")[2]] = body
            return {}, 200
        if self.path == "/api/repos/create":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return {"error": "Invalid username or password."}, 401
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repos:
                return {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409
            hub.create(name)
            return {"url": f"{hub.url}/{name}", "name": name}, 200
        if self.path == "/api/whoami-v2":
            return {"name": "me", "type": "user", "orgs": []}, 200
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            wanted = json.loads(body)["objects"]
            for item in wanted:
                if item["oid"] not in hub.objects:
                    item["actions"] = {"upload": {"href": f"{hub.url}/objects/{item['oid']}"}}
            return {"transfer": "basic", "objects": wanted}, 200
        if match := re.match(r"/api/models/([^/?]+/[^/?]+)(?:/([^?]*))?", self.path):
            name, rest = match.groups()
            if name not in hub.repos:
                return {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
            return self._repo(name, (rest or "").split("/")[0], body)
        if match := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path):
            name, revision, path = match.groups()
            for commit, files in reversed(hub.repos.get(name, [])):
                if revision in ("main", commit):
                    if path in files:
                        return commit, files[path]
                    return (
                        {"error": "Entry not found"},
                        404,
                        {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit},
                    )
        return {"error": f"no route {request}"}, 404

    def _repo(self, name, verb, body):
        hub = self.hub
        commit, files = hub.repos[name][-1]
        if verb in ("", "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            return {
                "id": name,
                "modelId": name,
                "sha": commit,
                "siblings": siblings,
                "private": False,
                "tags": [],
            }, 200
        if verb == "tree":
            return [{"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in files.items()], 200
        if verb == "preupload":
            modes = []
            for asked in json.loads(body)["files"]:
                content, lfs = files.get(asked["path"]), asked["path"].endswith(".safetensors")
                oid = None if content is None else hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
                modes.append(
                    {
                        "path": asked["path"],
                        "uploadMode": "lfs" if lfs else "regular",
                        "shouldIgnore": False,
                        "oid": oid,
                    }
                )
            return {"files": modes}, 200
        if verb == "commit":
            if hub.between is not None:
                other, hub.between = hub.between, None
                hub.commit(name, other)
            lines = [json.loads(line) for line in body.splitlines()]
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != hub.repos[name][-1][0]:
                return {"error": "A commit has happened since. Please refresh and try again."}, 412
            changes = {}
            for line in lines[1:]:
                value = line["value"]
                lfs = line["key"] == "lfsFile"
                changes[value["path"]] = hub.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
            oid = hub.commit(name, changes)
            return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"}, 200
        return {"error": f"no route {verb}"}, 404
