"""A Hugging Face hub on the loopback, as far as huggingface_hub asks: one model, its files, and uploads."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "a" * 40


class FakeHub(ThreadingHTTPServer):
    """`files` are those of `repo`; `asked` lists the requests, `uploaded` what was pushed."""

    daemon_threads = True

    def __init__(self, repo="some/model", files=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.files, self.asked, self.uploaded = repo, files or {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        repo = self.server.repo
        if path.startswith(f"/api/models/{repo}/tree/"):
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in self.server.files.items()
                ]
            )
        elif path.startswith(f"/api/models/{repo}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(
                {"id": repo, "modelId": repo, "sha": REVISION, "siblings": siblings, "private": False}
            )
        elif path.startswith(f"/{repo}/resolve/{REVISION}/"):
            content = self.server.files[path.split(f"/{REVISION}/")[1]]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(content, X_Repo_Commit=REVISION, ETag=f'"{etag}"')
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        if "Authorization" not in self.headers:
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/{self.server.repo}", "name": self.server.repo})
        elif "/preupload/" in path:
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in path:
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    content = base64.b64decode(operation["value"]["content"])
                    self.server.uploaded[operation["value"]["path"]] = content
            address = f"{self.server.url}/{self.server.repo}/commit/{REVISION}"
            self.answer({"commitUrl": address, "commitOid": REVISION, "success": True})
        else:
            self.answer(b"{}")
