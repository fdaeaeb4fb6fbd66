"""Engines that cannot be read: which cache is named, and what happens to it."""

from pathlib import Path

import pytest

from benchmarks.faults import engine_cache
from docker.entrypoint.engines import EngineCaches
from docker.entrypoint.serve import EXIT_UNHEALTHY
from export.accelerator import TENSORRT
from tests.docker.harness import Container

ERROR = '2026-01-31T12:00:00Z E 17 model.cc:12] "cannot deserialize {}/a.engine"\n'


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two caches of two models, with an engine in each."""
    made = [tmp_path / "caches" / name for name in ("one", "two")]
    for folder in made:
        folder.mkdir(parents=True)
        (folder / "a.engine").write_bytes(b"cut")
        model = tmp_path / "models" / folder.name
        model.mkdir(parents=True)
        (model / "config.pbtxt").write_text(TENSORRT.format(cache=folder, profile=""))
    return made


@pytest.mark.parametrize(
    "line",
    ["", "TensorRT is slow today\n", ERROR.replace(" E ", " W "), ERROR.replace("/a", "s/a")],
)
def test_a_cache_that_no_error_names_is_kept(
    folders: list[Path], tmp_path: Path, line: str
) -> None:
    caches = EngineCaches(tmp_path / "models")
    lines = [line.format(folders[0])]
    assert list(caches.watch(lines)) == lines
    assert not list(caches.clear_failed())
    assert all((folder / "a.engine").exists() for folder in folders)


def test_the_cache_that_an_error_names_is_emptied(folders: list[Path], tmp_path: Path) -> None:
    (folders[0] / "a.profile").write_bytes(b"cut as well")
    caches = EngineCaches(tmp_path / "models")
    list(caches.watch([ERROR.format(folders[0])]))
    (said,) = caches.clear_failed()
    assert f"An engine in {folders[0]}" in said
    assert "its 2 files were removed" in said
    assert not list(folders[0].iterdir())
    assert (folders[1] / "a.engine").exists()


def test_a_cache_that_cannot_be_emptied_is_named(folders: list[Path], tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "models")
    list(caches.watch([ERROR.format(folders[0])]))
    folders[0].rename(tmp_path / "gone")
    (said,) = caches.clear_failed()
    assert str(folders[0]) in said
    assert "empty it" in said


def test_a_start_that_fails_because_of_an_engine_removes_it(tmp_path: Path) -> None:
    """With the real server, and a model that fails as ONNX Runtime's provider does."""
    cache, models = tmp_path / "cache", tmp_path / "models"
    cache.mkdir()
    (cache / engine_cache.ENGINE).write_bytes(b"cut")
    engine_cache.add_stand_in(models, cache)
    with Container(models, tmp_path, "--host=127.0.0.1") as one:
        assert one.process.wait(120) == EXIT_UNHEALTHY
    assert not list(cache.iterdir())
    said = [r for r in one.records() if r["source"] == "entrypoint" and r["level"] == "error"]
    assert [engine_cache.CLEARED in r["message"] for r in said] == [True]
