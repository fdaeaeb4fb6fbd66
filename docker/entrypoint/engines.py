"""Remove TensorRT engines that cannot be read, so that the next start compiles them again.

ONNX Runtime writes an engine without checking that there was room for it, and a truncated one
fails every later start (its `tensorrt_execution_provider.cc`: `file.write`, "could not deserialize
engine from cache").
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from docker.entrypoint import logs

_CACHE = re.compile(r'key:\s*"trt_engine_cache_path"\s+value:\s*"([^"]+)"')


class EngineCaches:
    """The folders in which a repository's models cache engines, and which of them failed."""

    def __init__(self, repository: Path) -> None:
        self._folders = {
            folder
            for config in repository.glob("*/config.pbtxt")
            for folder in _CACHE.findall(_text(config))
        }
        self._failed: set[str] = set()

    def watch(self, lines: Iterable[str]) -> Iterator[str]:
        """Pass the lines through; remember each cache named in an error that Triton logs."""
        for line in lines:
            named = [one for one in self._folders if f"{one}/" in line]
            if named and logs.is_error(line):
                self._failed.update(named)
            yield line

    def clear_failed(self) -> Iterator[str]:
        """Empty the caches that failed; a sentence on each. All engines can be compiled again."""
        for folder in sorted(self._failed):
            files = [one for one in Path(folder).glob("*") if one.is_file()]
            try:
                for one in files:
                    one.unlink(missing_ok=True)
                free = shutil.disk_usage(folder).free
            except OSError as error:
                yield (
                    f"The engines in {folder} can be neither read nor removed ({error}): "
                    "empty it by hand"
                )
                continue
            yield (
                f"An engine in {folder} could not be read: its {len(files)} files were removed, "
                f"and the next start compiles again. {free / 1e6:,.0f} MB are free there now; an "
                "engine takes about as much as model.onnx"
            )


def _text(config: Path) -> str:
    """The file's text; empty if it cannot be read, which Triton itself reports."""
    try:
        return config.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
