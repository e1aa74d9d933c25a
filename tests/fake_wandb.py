"""A fake W&B server that receives runs and artifacts."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from tests.json_server import JSONHandler

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "someone"


@dataclass
class ServedRun:
    """A run as the server received it.

    Attributes:
        config: Values by key.
        history: One row per call of ``log``.
        files: Content by path.
        is_finished: Whether the client finished the run.
    """

    name: str
    display_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    is_finished: bool = False

    def values(self, key: str) -> list[Any]:
        """Return the values logged under a key, in order."""
        return [row[key] for row in self.history if key in row]


@dataclass
class ServedArtifact:
    """An artifact as the server received it.

    Attributes:
        files: Content by path of the uploaded files. The manifest lists references too.
        logged_by: Runs that logged the artifact.
        used_by: Runs that have the artifact as an input.
    """

    number: int
    name: str
    type: str
    digest: str
    metadata: dict[str, Any]
    aliases: list[str]
    manifests: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    logged_by: set[str] = field(default_factory=set)
    used_by: set[str] = field(default_factory=set)
    is_committed: bool = False

    @property
    def manifest(self) -> dict[str, Any]:
        """Manifest entries by path."""
        return json.loads(self.manifests["wandb_manifest.json"])["contents"]


class FakeWandb(ThreadingHTTPServer):
    """Server with the part of the W&B API that ``wandb-core`` 0.31 uses to send a run.

    Attributes:
        refusal: HTTP status of the response to requests without the key.
        runs: Runs by id.
        artifacts: Artifacts in order of creation, including the ones W&B creates itself.
        refused: Names of GraphQL operations that are denied.
        bodies: Bodies of all authorized requests and uploads.
        failures: Requests that the server could not handle; empty in a passing test. The response to them is a client
            error, because W&B retries after a server error for minutes.
    """

    daemon_threads = True

    def __init__(self, refusal: int = 401) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.refusal = refusal
        self.url = f"http://localhost:{self.server_port}"
        self.runs: dict[str, ServedRun] = {}
        self.artifacts: list[ServedArtifact] = []
        self.refused: set[str] = set()
        self.bodies: list[bytes] = []
        self.failures: list[str] = []
        self.uploads: list[tuple[dict[str, bytes], str]] = []
        self.lock = threading.Lock()

    def upload_url(self, into: dict[str, bytes], name: str) -> str:
        """Return a URL that stores a file under a name in ``into``."""
        self.uploads.append((into, name))
        return f"{self.url}/uploads/{len(self.uploads) - 1}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the response to a GraphQL operation."""
        if operation in self.refused:
            return {"data": None, "errors": [{"message": f"permission denied: {operation}"}]}
        try:
            with self.lock:
                return {"data": _OPERATIONS[operation](self, variables)}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self.failures.append(f"{operation}({json.dumps(variables)}): {error!r}")
            return {"data": None, "errors": [{"message": self.failures[-1]}]}


@contextmanager
def serving(refusal: int = 401) -> Iterator[FakeWandb]:
    """Run a server until the block ends."""
    with FakeWandb(refusal) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(JSONHandler):
    server: FakeWandb

    def _body(self) -> bytes:
        body = super()._body()
        self.server.bodies.append(body)
        return body

    def do_PUT(self) -> None:  # noqa: N802 - name required by http.server
        into, name = self.server.uploads[int(self.path.removeprefix("/uploads/"))]
        into[name] = self._body()
        self._answer({})

    def do_POST(self) -> None:  # noqa: N802 - name required by http.server
        body = self._body()
        if self.path.startswith("/sdk/otel/"):  # telemetry
            return self._answer({})
        if self.headers["Authorization"] != f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}":
            return self._answer({"errors": [{"message": "user is not logged in"}], "data": None}, self.server.refusal)
        stream = re.fullmatch(rf"/files/{ENTITY}/[^/]+/([^/]+)/file_stream", self.path)
        if stream:
            self._take_stream(self.server.runs[stream[1]], json.loads(body))
            return self._answer({})
        if self.path != "/graphql":
            return self._answer({"errors": [{"message": f"unknown path {self.path}"}]}, 404)
        request = json.loads(body)
        found = re.match(r"\s*(?:query|mutation)\s+(\w+)", request["query"])
        self._answer(self.server.answer(found[1] if found else "", request.get("variables") or {}))

    def _take_stream(self, run: ServedRun, stream: dict[str, Any]) -> None:
        for name, chunk in stream.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] : chunk["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        run.is_finished |= stream.get("complete", False)


def _project(name: str) -> dict[str, Any]:
    return {"id": "project", "name": name, "entity": {"id": "entity", "name": ENTITY}}


def _viewer(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    viewer = {"id": "viewer", "entity": ENTITY, "username": ENTITY, "email": "someone@example.com", "flags": "{}"}
    return {"viewer": {**viewer, "teams": {"edges": []}}}


def _resume_status(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    run = server.runs.get(variables["name"])
    bucket = run and {
        "id": run.name,
        "name": run.name,
        "displayName": run.display_name,
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsLineCount": 0,
        "eventsTail": "[]",
        "logLineCount": 0,
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "wandbConfig": json.dumps(run.config["_wandb"]),
        "tags": [],
    }
    return {"model": {**_project(variables["project"]), "bucket": bucket}}


def _upsert_run(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    is_new = variables["name"] not in server.runs
    run = server.runs.setdefault(variables["name"], ServedRun(variables["name"]))
    run.display_name = variables["displayName"] or run.display_name
    if variables["config"]:
        run.config |= {key: item["value"] for key, item in json.loads(variables["config"]).items()}
    bucket = {
        "id": run.name,
        "name": run.name,
        "displayName": run.display_name,
        "config": "{}",
        "project": _project(variables["project"]),
        "historyLineCount": len(run.history),
    }
    return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}


def _create_run_files(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    into = server.runs[variables["run"]].files
    files = [{"name": name, "uploadUrl": server.upload_url(into, name)} for name in variables["files"]]
    return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}


def _artifact_type(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    name = variables["name"].split(":")[0]
    types = [artifact.type for artifact in server.artifacts if artifact.name == name]
    return {"project": {"artifact": {"artifactType": {"name": types[0]}} if types else None}}


def _create_artifact(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    given = variables["input"]
    versions = [artifact for artifact in server.artifacts if artifact.name == given["artifactCollectionName"]]
    same = [artifact for artifact in versions if artifact.digest == given["digest"] and artifact.is_committed]
    artifact = same[0] if same else ServedArtifact(
        len(server.artifacts),
        given["artifactCollectionName"],
        given["artifactTypeName"],
        given["digest"],
        json.loads(given["metadata"] or "{}"),
        [alias["alias"] for alias in given["aliases"] or []],
    )  # fmt: skip
    if not same:
        server.artifacts.append(artifact)
    if given["runName"]:
        artifact.logged_by.add(given["runName"])
    latest = {"id": str(versions[-1].number)} if versions else None
    state = "COMMITTED" if artifact.is_committed else "PENDING"
    sequence = {"latestArtifact": latest}
    return {"createArtifact": {"artifact": {"id": str(artifact.number), "state": state, "artifactSequence": sequence}}}


def _create_manifest(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    into = server.artifacts[int(variables["artifactID"])].manifests
    file: dict[str, Any] = {"id": "file"}
    if variables["includeUpload"]:
        file |= {"uploadUrl": server.upload_url(into, variables["name"]), "uploadHeaders": []}
    return {"createArtifactManifest": {"artifactManifest": {"id": variables["artifactID"], "file": file}}}


def _create_artifact_files(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    edges = []
    for file in variables["input"]["artifactFiles"]:
        into = server.artifacts[int(file["artifactID"])].files
        node = {"storagePath": None, "uploadUrl": server.upload_url(into, file["name"]), "uploadHeaders": []}
        edges.append({"node": {**node, "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}})
    return {"createArtifactFiles": {"files": {"edges": edges}}}


def _commit_artifact(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    artifact = server.artifacts[int(variables["artifactID"])]
    artifact.is_committed = True
    return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact.digest}}}


def _use_artifact(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    given = variables["input"]
    server.artifacts[int(given["artifactID"])].used_by.add(given["runName"])
    return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}


def _artifact_by_id(server: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    artifact = server.artifacts[int(variables["id"])]
    project = {"id": "project", "internalId": "1", "name": "project", "entity": {"name": ENTITY}}
    fields = {
        "id": variables["id"],
        "artifactSequence": {"__typename": "ArtifactSequence", "name": artifact.name, "project": project},
        "versionIndex": 0,
        "artifactType": {"name": artifact.type},
        "metadata": json.dumps(artifact.metadata),
        "state": "COMMITTED",
        "digest": artifact.digest,
        "size": sum(len(content) for content in artifact.files.values()),
        "fileCount": len(artifact.files),
        "createdAt": "2026-01-01T00:00:00",
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "aliases": [],
    }
    return {"artifact": fields | dict.fromkeys(("description", "historyStep", "commitHash", "updatedAt"))}


_OPERATIONS: dict[str, Callable[[FakeWandb, dict[str, Any]], dict[str, Any]]] = {
    "ArtifactByID": _artifact_by_id,
    "ArtifactType": _artifact_type,
    "CommitArtifact": _commit_artifact,
    "CreateArtifact": _create_artifact,
    "CreateArtifactFiles": _create_artifact_files,
    "CreateArtifactManifest": _create_manifest,
    "CreateRunFiles": _create_run_files,
    "OrganizationCoreWeaveOrganizationID": lambda server, variables: {"entity": {"organization": None}},
    "RunResumeStatus": _resume_status,
    "RunStoppedStatus": lambda server, variables: {"project": {"run": {"stopped": False}}},
    "ServerFeaturesQuery": lambda server, variables: {"serverInfo": {"features": []}},
    "UpsertBucket": _upsert_run,
    "UseArtifact": _use_artifact,
    "Viewer": _viewer,
}
