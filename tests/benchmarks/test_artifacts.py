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


def test_changed_sources_build_anew_and_the_old_go(sources: Path) -> None:
    first = artifacts._folder("demo", ())
    first.mkdir(parents=True)
    assert artifacts._folder("demo", ()) == first
    sources.write_text("two")
    second = artifacts._folder("demo", ())
    assert second != first
    assert not first.exists()


def test_another_models_artifacts_stay(sources: Path) -> None:
    other = artifacts._folder("full-size", ())
    other.mkdir(parents=True)
    sources.write_text("two")
    artifacts._folder("demo", ())
    assert other.exists()


def test_an_interrupted_write_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    target = tmp_path / "sam3.pt"

    def fails(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts._write_whole(target, fails)
    assert not target.exists()
    artifacts._write_whole(target, lambda path: path.write_text("whole"))
    assert target.read_text() == "whole"
