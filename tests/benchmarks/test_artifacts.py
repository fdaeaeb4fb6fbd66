from pathlib import Path

import pytest

from benchmarks import artifacts


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "encoder.py").write_text("one")
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    monkeypatch.setattr(artifacts, "BUILD", tmp_path / "build")
    return tmp_path / "export" / "encoder.py"


def test_artifacts_of_older_sources_are_deleted_on_a_rebuild(sources: Path) -> None:
    first = artifacts._folder("demo", ())
    first.mkdir(parents=True)  # by a process that has exited
    other = artifacts._folder("full-size", ())
    other.mkdir()
    assert artifacts._folder("demo", ()) == first
    sources.write_text("two")
    second = artifacts._folder("demo", ())
    assert second != first
    assert first.exists()  # another run may be building it
    with artifacts._build_lock(second):
        assert second.exists()
        assert not first.exists()
        assert other.exists()


def test_artifacts_in_use_by_a_running_process_are_not_deleted(sources: Path) -> None:
    first = artifacts._folder("demo", ())
    with artifacts._build_lock(first):
        pass
    sources.write_text("two")
    with artifacts._build_lock(artifacts._folder("demo", ())):
        assert first.exists()


def test_other_package_versions_trigger_a_rebuild(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = artifacts._folder("demo", ())
    monkeypatch.setattr(artifacts, "versions", lambda: "onnxscript 99")
    assert artifacts._folder("demo", ()) != first


def test_an_interrupted_write_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    target = tmp_path / "sam3.pt"

    def fails(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts._write_atomically(target, fails)
    assert not target.exists()
    artifacts._write_atomically(target, lambda path: path.write_text("whole"))
    assert target.read_text() == "whole"
