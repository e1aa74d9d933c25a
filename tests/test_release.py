"""The release: versions that must agree, and the permissions of the workflow that publishes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    return re.findall(r'^version = "(.+)"$', text("pyproject.toml"), flags=re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("CITATION.cff", r"^version: (.+)$"),
        ("Dockerfile", r'image\.version="(.+)"$'),
        ("CHANGELOG.md", r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$"),
    ],
)
def test_version_is_that_of_the_project(name: str, pattern: str) -> None:
    assert re.findall(pattern, text(name), flags=re.MULTILINE)[0] == version()


def test_badges_state_the_metadata() -> None:
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-([^-]+)-", text("README.md")))
    python = re.findall(r'^requires-python = ">=(.+)"$', text("pyproject.toml"), flags=re.MULTILINE)[0]
    assert badges == {"python": f"{python}%2B", "license": "MIT"}
    assert 'license = "MIT"' in text("pyproject.toml")


def test_only_the_publishing_job_may_publish() -> None:
    workflow = yaml.safe_load(text(".github/workflows/release.yml"))
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert [name for name, job in jobs.items() if "environment" in job] == ["publish"]
    assert [name for name, job in jobs.items() if job.get("permissions", {}).get("contents") == "write"] == [
        "github-release"
    ]
    assert "password" not in text(".github/workflows/release.yml")
