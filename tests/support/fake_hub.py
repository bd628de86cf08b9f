"""A Hugging Face hub on the loopback, as far as huggingface_hub asks: one model, its files, and uploads."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from compactgpt.common.storage import write_text

REPO, REVISION = "some/model", "a" * 40


def fill_model_cache(cache, params, name):
    """Put the files that a baseline of the hub needs, without content, in a cache of the hub."""
    spec = params.baseline.specs[name]
    folder = cache / f"models--{spec.repo.replace('/', '--')}/snapshots/{spec.revision}"
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        write_text(folder / file, "x")
    return folder


class FakeHub(ThreadingHTTPServer):
    """Serves `files` of one model; `asked` lists the requests, `uploaded` holds what was pushed."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.uploaded = files, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        files = self.server.files
        if path.startswith(f"/api/models/{REPO}/tree/"):
            file = {"type": "file", "oid": "0" * 40}
            self.answer([{**file, "path": name, "size": len(files[name])} for name in files])
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": REPO, "sha": REVISION, "siblings": siblings, "private": False})
        elif path.startswith(f"/{REPO}/resolve/{REVISION}/"):
            content = files[path.split(f"/{REVISION}/")[1]]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(content, X_Repo_Commit=REVISION, ETag=f'"{etag}"')
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 (`answer` sends no body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if "Authorization" not in self.headers:
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/{REPO}", "name": REPO})
        elif "/preupload/" in path:
            files = [each["path"] for each in json.loads(body)["files"]]
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **kind} for name in files]})
        elif "/commit/" in path:
            _header, *files = [json.loads(line)["value"] for line in body.splitlines()]
            self.server.uploaded = {file["path"]: base64.b64decode(file["content"]) for file in files}
            address = f"{self.server.url}/{REPO}/commit/{REVISION}"
            self.answer({"commitUrl": address, "commitOid": REVISION, "success": True})
        else:
            self.answer(b"{}")
