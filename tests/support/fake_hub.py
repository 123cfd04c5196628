"""A server on 127.0.0.1 with the part of the Hugging Face hub's API that fetching a repository needs."""

import hashlib
import http.server
import json
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`repositories`: {"owner/name": {"config.json": bytes, ...}}. `requests` lists the requests in order."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.requests: list[str] = []

    def __enter__(self):
        hub = self

        class Bound(Handler):
            owner = hub

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        self.owner.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/.+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        name = (api or file)[1] if api or file else ""
        files = self.owner.repositories.get(name)
        if files is None:  # the hub's answer for a private and for a missing repository
            self.send(401, b'{"error": "Invalid username or password."}', with_body, {"X-Error-Code": "RepoNotFound"})
        elif api:
            content = tree(files) if api[2] == "tree" else about(name, files)
            self.send(200, json.dumps(content).encode(), with_body, {"Content-Type": "application/json"})
        elif file[2] not in files:
            self.send(404, b"Entry not found", with_body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            body = files[file[2]]
            etag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.send(200, body, with_body, etag | {"Accept-Ranges": "bytes"})

    def send(self, code: int, body: bytes, with_body: bool, headers: dict[str, str]):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def about(name: str, files: dict[str, bytes]) -> dict:
    siblings = [{"rfilename": path} for path in files]
    return {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}


def tree(files: dict[str, bytes]) -> list[dict]:
    return [{"type": "file", "path": path, "size": len(body), "oid": COMMIT} for path, body in files.items()]
