"""The CI snippets parse, ask for no more than they need, and their commands work with the identity of such a job."""

from __future__ import annotations

import json
import os
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import verify_bundles
from pointcall_executor import cli
from pointcall_keys.public_roots import PINNED
from tests.unit.signing.rb1 import module
from tests.unit.signing.test_assemble import YAML
from tests.unit.signing.world import NOW, World, declaration

ROOT = Path(__file__).resolve().parents[3]
CI = ROOT / "deploy/ci"
GITHUB, GITLAB = "https://token.actions.githubusercontent.com", "https://gitlab.com"
WORKFLOW = "example-org/runbooks/.github/workflows/sign.yml@refs/heads/main"


def load(name: str) -> dict[Any, Any]:
    value = yaml.safe_load((CI / name).read_text())
    assert isinstance(value, dict)
    return value


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "manifest.yaml").write_text(YAML)
    (tmp_path / "restart.wasm").write_bytes(module())
    (tmp_path / "db.json").write_bytes(declaration())
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if re.match(r"(GITHUB|GITLAB|CI$|ACTIONS|BUILDKITE|CIRCLE|SIGSTORE)", name):
            monkeypatch.delenv(name)
    return tmp_path


def play(lines: list[str], world: World, project: Path) -> None:
    """Run the `pointcall` lines of a snippet, against the private instance instead of the public one."""
    (project / "trust.json").write_text(json.dumps(world.sigstore.trust_config()))
    calls = [shlex.split(os.path.expandvars(line))[1:] for line in lines if line.startswith("pointcall ")]
    assert [call[0] for call in calls] == ["build", "sign"]
    for call in calls:
        assert cli.main([*call, *(["--trust-config", str(project / "trust.json")] if call[0] == "sign" else [])]) == 0


def signer_of(world: World, project: Path, **signer: Any) -> str:
    bundle = (project / "out/manifest.sigstore.json").read_bytes()
    policy = world.policy(signers=[signer])
    root = world.sigstore.trusted_root()
    return verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW, in_process=True).signers[0].identity


def builder_of(project: Path) -> str:
    """The builder of the module, in a statement that was signed too."""
    assert (project / "out/provenance/restart.sigstore.json").is_file()
    said = json.loads((project / "out/provenance/restart.json").read_bytes())
    return str(said["predicate"]["runDetails"]["builder"]["id"])


def test_github_asks_for_the_identity_and_nothing_else() -> None:
    workflow = load("github-sign.yml")
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {}
    assert job["permissions"] == {"contents": "read", "id-token": "write"}
    assert workflow[True] == {"push": {"branches": ["main"]}}  # YAML 1.1 reads `on` as true
    assert job["steps"][0]["with"]["persist-credentials"] is False


def test_the_workflow_of_our_own_releases() -> None:
    workflow = load("github-release.yml")
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {}
    assert job["permissions"] == {"contents": "read", "id-token": "write"}
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    assert [step["run"] for step in job["steps"] if "run" in step] == ["sudo -E make release SIGN="]
    assert re.search(r"^release: ", (ROOT / "Makefile").read_text(), re.MULTILINE)


class _TokenServer(BaseHTTPRequestHandler):
    token = ""

    def do_GET(self) -> None:
        body = json.dumps({"value": self.token}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def token_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _TokenServer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/?api-version=1"
        server.shutdown()
        thread.join()


def test_the_github_snippet(world: World, project: Path, token_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world.sigstore.accept_issuer(GITHUB, "github")
    _TokenServer.token = world.sigstore.token(
        "repo:example-org/runbooks:ref:refs/heads/main",
        iss=GITHUB,
        repository="example-org/runbooks",
        repository_id="123456789",
        event_name="push",
        runner_environment="github-hosted",
        job_workflow_ref=WORKFLOW,
    )
    for name, value in {
        "GITHUB_ACTIONS": "true",
        "GITHUB_RUN_NUMBER": "12",
        "GITHUB_REPOSITORY": "example-org/runbooks",
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_WORKFLOW_REF": WORKFLOW,
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "t",
        "ACTIONS_ID_TOKEN_REQUEST_URL": token_url,
    }.items():
        monkeypatch.setenv(name, value)
    (job,) = load("github-sign.yml")["jobs"].values()
    play([step["run"] for step in job["steps"] if "run" in step], world, project)
    assert builder_of(project) == f"https://github.com/{WORKFLOW}"
    example = TrustPolicy.parse((ROOT / "keys/trust/example-policy.github.json").read_bytes())
    row = example.signers[0].model_dump(mode="json", exclude_none=True)
    assert signer_of(world, project, **row) == f"https://github.com/{WORKFLOW}"


@pytest.mark.parametrize(("provider", "kind"), [("buildkite", "uri"), ("circleci", "uri"), ("google", "email")])
def test_other_ambient_identities(
    world: World, project: Path, monkeypatch: pytest.MonkeyPatch, provider: str, kind: Any
) -> None:
    """Each provider's own way to ask for a token, with a stand-in for its agent that gives one of our instance."""
    issuer, subject = {
        "buildkite": ("https://agent.buildkite.com", "https://buildkite.com/example-org/runbooks"),
        "circleci": ("https://oidc.circleci.com", "https://circleci.com/api/v2/projects/1/pipeline-definitions/2"),
        "google": ("https://accounts.google.com", "signer@example.iam.gserviceaccount.com"),
    }[provider]
    world.sigstore.accept_issuer(issuer, kind)
    claims = {"email": subject, "email_verified": True} if kind == "email" else {}
    token = world.sigstore.token(subject, iss=issuer, **claims)
    if provider == "google":
        server = HTTPServer(("127.0.0.1", 0), _Metadata)
        _Metadata.token = token
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        (project / "product_name").write_text("Google Compute Engine\n")
        ambient = "id._internal.oidc.ambient"
        monkeypatch.setattr(f"{ambient}._GCP_PRODUCT_NAME_FILE", str(project / "product_name"))
        monkeypatch.setattr(f"{ambient}._GCP_IDENTITY_REQUEST_URL", f"http://127.0.0.1:{server.server_port}/identity")
    else:
        agent = project / {"buildkite": "buildkite-agent", "circleci": "circleci"}[provider]
        agent.write_text(f"#!/bin/sh\necho {token}\n")
        agent.chmod(0o755)
        monkeypatch.setenv("PATH", f"{project}:{os.environ['PATH']}")
        monkeypatch.setenv({"buildkite": "BUILDKITE", "circleci": "CIRCLECI"}[provider], "true")
    play(["pointcall build . --out out", "pointcall sign out"], world, project)
    if provider == "google":
        server.shutdown()
        server.server_close()
    assert signer_of(world, project, issuer=issuer, identity=subject) == subject


class _Metadata(_TokenServer):
    """Google's metadata server gives the token as it is."""

    def do_GET(self) -> None:
        good = self.headers["Metadata-Flavor"] == "Google" and "audience=sigstore" in self.path
        body = self.token.encode() if good else b""
        self.send_response(200 if good else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_gitlab_snippet(world: World, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.sigstore.accept_issuer(GITLAB, "gitlab")
    where = "gitlab.com/example-org/runbooks//.gitlab-ci.yml@refs/heads/main"
    claims = {
        "iss": GITLAB,
        "ci_config_ref_uri": where,
        "project_path": "example-org/runbooks",
        "pipeline_source": "push",
        "runner_environment": "gitlab-hosted",
    }
    job = load("gitlab-sign.yml")["sign"]
    assert job["id_tokens"] == {"SIGSTORE_ID_TOKEN": {"aud": "sigstore"}}
    monkeypatch.setenv("GITLAB_CI", "true")
    monkeypatch.setenv("CI_PIPELINE_IID", "3")
    monkeypatch.setenv("CI_PROJECT_URL", "https://gitlab.com/example-org/runbooks")
    monkeypatch.setenv("CI_CONFIG_PATH", ".gitlab-ci.yml")
    monkeypatch.setenv("CI_COMMIT_BRANCH", "main")
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", world.sigstore.token("project_path:example-org/runbooks", **claims))
    play(job["script"], world, project)
    assert builder_of(project) == f"https://{where}"
    row = {"source_repository": "https://gitlab.com/example-org/runbooks", "build_trigger": ["push"]}
    assert signer_of(world, project, issuer=GITLAB, identity=f"https://{where}", **row) == f"https://{where}"


@pytest.mark.parametrize("path", sorted((ROOT / "keys/trust").glob("*.json")), ids=lambda p: p.name)
def test_the_example_policies(path: Path) -> None:
    assert TrustPolicy.parse(path.read_bytes())


def test_the_public_example_pins_the_root_that_we_carry() -> None:
    policy = TrustPolicy.parse((ROOT / "keys/trust/example-policy.github.json").read_bytes())
    assert policy.trusted_root_sha256 == PINNED["public-good"]
