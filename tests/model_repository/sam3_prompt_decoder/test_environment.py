"""The environment that the decoder sets before torch reads it."""

from __future__ import annotations

import importlib
import os

import environment
import pytest
import torch

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF")


def test_variables_already_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    importlib.reload(environment)
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert all(name in os.environ for name in NAMES)


def test_torch_knows_the_allocators_setting() -> None:
    """torch reads it only on a GPU, and rejects what it does not know there."""
    set_allocator = torch._C._accelerator_setAllocatorSettings
    set_allocator(os.environ["PYTORCH_ALLOC_CONF"])
    with pytest.raises(ValueError, match="Unrecognized key"):
        set_allocator("expandable:True")
