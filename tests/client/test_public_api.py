"""What `from triton_sam3 import …` offers: a change here is a change for every user."""

import inspect
import subprocess
import sys
from types import UnionType
from typing import Union, get_origin

import pytest

import triton_sam3
from triton_sam3 import AsyncClient, AsyncView, Client, View

NAMES = [
    "AccessDenied",
    "AsyncClient",
    "AsyncView",
    "Box",
    "BoxesLike",
    "Client",
    "ClientUnusable",
    "DeadlineExceeded",
    "ImageError",
    "ImageLike",
    "ImageNotKept",
    "InvalidRequest",
    "Mask",
    "ModelStatus",
    "ModelUnavailable",
    "Outcome",
    "Overloaded",
    "Point",
    "PointsLike",
    "Polygon",
    "Prompt",
    "PromptError",
    "SAM3Error",
    "Segmentation",
    "ServedModel",
    "ServerError",
    "ServerStatus",
    "ServerUnreachable",
    "TransportError",
    "View",
    "run_block",
]


def test_the_public_names_are_these() -> None:
    assert sorted(triton_sam3.__all__) == sorted(NAMES)
    assert all(hasattr(triton_sam3, name) for name in NAMES)


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize(("blocking", "awaited"), [(Client, AsyncClient), (View, AsyncView)])
def test_both_clients_have_the_same_methods_arguments_and_defaults(
    blocking: type, awaited: type
) -> None:
    assert public(blocking) == public(awaited)
    methods = [name for name in public(blocking) if inspect.isfunction(vars(blocking)[name])]
    assert methods
    for name in ("__init__", *methods):
        if blocking is View and name == "__init__":
            continue  # made by Client.open
        one, other = (inspect.signature(getattr(kind, name)) for kind in (blocking, awaited))
        assert str(one.replace(return_annotation=None)) == str(
            other.replace(return_annotation=None)
        )


def test_every_public_name_is_documented() -> None:
    for name in NAMES:
        value = getattr(triton_sam3, name)
        if get_origin(value) in (Union, UnionType):
            continue  # an alias is documented below it, where Python does not see it
        assert inspect.getdoc(value), name


def test_importing_needs_no_torch() -> None:
    code = "import sys, triton_sam3, triton_sam3.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
