import subprocess
from pathlib import Path

from benchmarks.environment import commit, provenance


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_tells_when_the_checkout_has_changes(tmp_path: Path) -> None:
    assert "not a git checkout" in commit(tmp_path / "nowhere")
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == f"{head} with uncommitted changes"


def test_provenance_names_command_commit_machine_and_versions() -> None:
    found = provenance("make bench")
    text = found.markdown()
    assert "`make bench` at commit " in text
    assert found.commit in text
    assert "GiB" in found.machine
    assert "torch " in found.versions
    assert "Python 3." in found.versions
