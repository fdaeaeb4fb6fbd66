"""A CUDA graph's rules on a CPU: operators are replayed on the memory they were recorded with.

As on a GPU, memory allocated while recording belongs to the graph, and earlier memory does not: a
replay finds it by its address, and others must keep it alive. If nobody did, that is an error here;
on a GPU the replay would use whatever is there by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only


class Graph(TorchDispatchMode):
    """Records the operators that run in its context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._own: set[int] = set()
        """Storages allocated while recording, kept alive by `_steps`."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = func(*args, **kwargs)
        fresh = [t for t in _tensors(made) if t.untyped_storage()._cdata not in before]
        self._own |= {tensor.untyped_storage()._cdata for tensor in fresh}
        given = tree_map_only(Tensor, self._held, (args, kwargs))
        self._steps.append((func, *given, fresh))
        return made

    def replay(self) -> None:
        """Raises RuntimeError if memory that the graph does not own has been freed."""
        with torch.inference_mode():
            for func, args, kwargs, kept in self._steps:
                given = tree_map_only(_Borrowed, _Borrowed.tensor, (args, kwargs))
                made = func(*given[0], **given[1])
                own = {t.untyped_storage()._cdata for t in _tensors(given)}
                fresh = (t for t in _tensors(made) if t.untyped_storage()._cdata not in own)
                for old, new in zip(kept, fresh, strict=True):
                    old.copy_(new)

    def _held(self, tensor: Tensor) -> Tensor | _Borrowed:
        own = tensor.untyped_storage()._cdata in self._own
        return tensor if own else _Borrowed(tensor)


class _Borrowed:
    """A tensor whose memory somebody else must keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._dtype = tensor.dtype
        self._shape = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise RuntimeError(f"a graph reads memory that was freed: {self._shape}")
        made = torch.empty(0, dtype=self._dtype)
        return made.set_(storage, *self._shape)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
