"""A local stand-in for the Hugging Face Hub that receives uploads."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import ThreadingHTTPServer

from tests.json_server import JSONHandler

TOKEN = "hf_SecretTokenOfTheTest"


class FakeHub(ThreadingHTTPServer):
    """An HTTP server with the endpoints that ``HfApi.upload_folder`` uses.

    Attributes:
        files: Content of each committed file, by path.
        visibility: Visibility that the repository was created with.
    """

    def __init__(self) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.url = f"http://localhost:{self.server_port}"
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.visibility: str | None = None


class _Handler(JSONHandler):
    server: FakeHub

    def do_PUT(self) -> None:  # noqa: N802 - required by http.server
        content = self._body()
        assert self.path == f"/blobs/{hashlib.sha256(content).hexdigest()}"
        self.server.blobs[self.path.rsplit("/", 1)[1]] = content
        self._answer({})

    def do_POST(self) -> None:  # noqa: N802 - required by http.server
        body = self._body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer({"error": f"bad token {self.headers['Authorization']}"}, 401)
        if self.path == "/api/repos/create":
            self.server.visibility = json.loads(body)["visibility"]
            return self._answer({"url": f"{self.server.url}/me/snake"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/models/me/snake/preupload/main":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if self.path == "/me/snake.git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/blobs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if self.path == "/api/models/me/snake/commit/main":
            commit = f"{self.server.url}/me/snake/commit/{'0' * 40}"
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            return self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": commit})
        return self._answer({"error": f"not found: {self.path}"}, 404)
