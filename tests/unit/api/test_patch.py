"""The patch: real git applies it, and it adds exactly the files it says, whatever the submitter wrote."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointcall_attest.printable import hides
from pointcall_executor.agent_api import patch
from pointcall_executor.agent_api.proposal import Proposal
from tests.unit.api.proposals import proposal

DATE = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_COMMITTER_NAME": "Reviewer",
    "GIT_COMMITTER_EMAIL": "reviewer@example.org",
    "LC_ALL": "C.UTF-8",
}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(repository: Path, *words: str, stdin: bytes | None = None) -> str:
    done = subprocess.run(
        ["git", *words], cwd=repository, env=ENVIRONMENT, input=stdin, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "commit", "--quiet", "--allow-empty", "--message=start", "--author=A <a@example.org>")
    return folder


def applied(repository: Path, made: Proposal) -> dict[str, bytes]:
    git(repository, "am", "--quiet", "-", stdin=patch.render(made, DATE).encode())
    names = git(repository, "show", "--name-only", "--format=", "-z", "HEAD").strip("\0").split("\0")
    return {name: (repository / name).read_bytes() for name in names}


def test_git_am_makes_the_files(repository: Path) -> None:
    made = proposal("from pointcall_runbook import Recreate\n\n\ndef on(e):\n    return []\n")
    assert applied(repository, made) == {name: content.encode() for name, content in patch.files(made).items()}
    modes = {line.split()[0] for line in git(repository, "ls-files", "--stage").splitlines()}
    assert modes == {"100644"}
    assert git(repository, "status", "--porcelain") == ""


def test_the_commit_says_where_it_comes_from_and_claims_no_author(repository: Path) -> None:
    applied(repository, proposal(author="torvalds@linux-foundation.org"))
    assert git(repository, "log", "-1", "--format=%an <%ae>") == "Pointcall proposals <proposals@pointcall.invalid>\n"
    assert git(repository, "log", "-1", "--format=%s") == "runbooks: propose cache-breaker\n"
    assert "Proposed by torvalds@linux-foundation.org (not verified)." in git(repository, "log", "-1", "--format=%b")


def test_the_same_proposal_gives_the_same_bytes() -> None:
    assert patch.render(proposal(), DATE) == patch.render(proposal(), DATE)


SMUGGLED = """looks harmless
---
diff --git a/.github/workflows/ci.yml b/.github/workflows/ci.yml
new file mode 100644
--- /dev/null
+++ b/.github/workflows/ci.yml
@@ -0,0 +1 @@
+run: curl evil
--
2.39
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Maintainer <m@example.org>
Subject: [PATCH] more
-- >8 --
"""


@pytest.mark.parametrize("where", ["rationale", "source"])
def test_text_that_looks_like_a_patch_stays_text(repository: Path, where: str) -> None:
    made = proposal(**{where: SMUGGLED})
    files = applied(repository, made)
    assert set(files) == set(patch.files(made))
    assert all(name.startswith("runbooks/library/cache-breaker/") for name in files)
    assert git(repository, "rev-list", "--count", "HEAD") == "2\n"


def test_submitted_markdown_is_an_indented_block() -> None:
    shown = patch.readme(proposal(rationale="ok\n![x](https://evil.example/x.png)\n# title\n"))
    assert "\n    ![x](https://evil.example/x.png)\n    # title\n" in shown


allowed = st.text(st.characters(exclude_categories=["Cs"]).filter(lambda c: not hides(c)), min_size=1, max_size=200)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=allowed, rationale=allowed)
def test_any_allowed_text_arrives_unchanged(
    tmp_path_factory: pytest.TempPathFactory, source: str, rationale: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    git(folder, "init", "--quiet", "--initial-branch=main")
    made = proposal(source, rationale)
    files = applied(folder, made)
    assert files["runbooks/library/cache-breaker/runbook.py"] == source.encode()
    assert files == {name: content.encode() for name, content in patch.files(made).items()}
