"""What TensorRT compiled and nobody can read: taken away, so that the next start compiles it anew.

ONNX Runtime writes an engine without looking whether there was room for it, and what was cut off
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
    """The folders in which a repository's models keep engines, and which of them failed."""

    def __init__(self, repository: Path) -> None:
        self._folders = {
            folder
            for config in repository.glob("*/config.pbtxt")
            for folder in _CACHE.findall(_text(config))
        }
        self._blamed: set[str] = set()

    def overhear(self, lines: Iterable[str]) -> Iterator[str]:
        """The same lines; what Triton calls an error of a file in a cache is remembered."""
        for line in lines:
            named = [one for one in self._folders if f"{one}/" in line]
            if named and logs.is_error(line):
                self._blamed.update(named)
            yield line

    def clear_blamed(self) -> Iterator[str]:
        """Empty the caches that failed; a sentence on each. All in them can be compiled again."""
        for folder in sorted(self._blamed):
            files = [one for one in Path(folder).glob("*") if one.is_file()]
            try:
                for one in files:
                    one.unlink(missing_ok=True)
                free = shutil.disk_usage(folder).free
            except OSError as error:
                yield f"The engines in {folder} cannot be read, nor removed ({error}): empty it"
                continue
            yield (
                f"An engine in {folder} could not be read: its {len(files)} files were removed, "
                f"and the next start compiles anew. {free / 1e6:,.0f} MB are free there now; an "
                "engine takes about as much as model.onnx"
            )


def _text(config: Path) -> str:
    """Nothing of one that cannot be read: Triton says so itself."""
    try:
        return config.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
