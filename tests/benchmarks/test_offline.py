"""The GPU benchmark's packs: their contents, and parts that arrive one by one, in any order."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from benchmarks import offline

CONTENT = bytes(range(256)) * 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = offline.split(CONTENT, 1000)
    for number, part in enumerate(parts):
        (tmp_path / f"base.tar.xz.{number:02}").write_bytes(part)
    digest = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "base.txt").write_text(f"{len(parts)} {digest}\n")
    return tmp_path


def test_parts_have_the_given_size_and_can_be_joined(folder: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(folder.glob("base.tar.xz.*"))]
    assert sizes == [1000, 1000, 560]
    assert offline.join(folder, "base") == CONTENT


def test_a_part_that_has_not_arrived_is_named(folder: Path) -> None:
    (folder / "base.tar.xz.01").unlink()
    with pytest.raises(ValueError, match=r"base is incomplete: copy base\.tar\.xz\.01 too$"):
        offline.join(folder, "base")


def test_a_truncated_part_is_not_unpacked(folder: Path) -> None:
    (folder / "base.tar.xz.02").write_bytes(b"cut")
    with pytest.raises(ValueError, match="base is damaged"):
        offline.join(folder, "base")


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("pytriton/tritonserver/bin/tritonserver", True),
        ("pytriton/tritonserver/python_backend_stubs/3.12/triton_python_backend_stub", True),
        ("pytriton/tritonserver/python_backend_stubs/3.10/triton_python_backend_stub", False),
        ("pytriton/__init__.py", True),
        ("pytriton/client/client.py", False),
        ("nvidia_pytriton.libs/libb64.so.0d", True),
        ("nvidia_pytriton.libs/libpython3-0c3a.12.so.1.0", False),
        ("onnxruntime/capi/libonnxruntime_providers_cuda.so", True),
        ("onnxruntime/transformers/optimizer.py", False),
        ("onnxruntime/capi/libonnxruntime.so.1.30.0", False),
        ("onnxruntime/capi/libonnxruntime_providers_shared.so", True),
        ("numpy/core/numeric.py", True),
    ],
)
def test_only_what_runs_offline_is_packed(name: str, packed: bool) -> None:
    assert offline.wanted(name, "3.12") is packed


@pytest.mark.parametrize(
    ("source", "unneeded"),
    [
        ("moe_gemm_kernels_fp16_fp4_cu", True),
        ("flash_fwd_hdim64_fp16_sm80_cu", False),
        ("flash_fwd_split_hdim64_fp16_sm80_cu", False),
        ("flash_fwd_hdim64_fp16_causal_sm80_cu", True),
        ("flash_fwd_hdim128_fp16_sm80_cu", True),
        ("fmha_sm80_cu", False),
        ("skip_layer_norm_impl_cu", False),
        ("rotary_embedding_impl_cu", False),
        ("", False),
    ],
)
def test_the_encoders_own_kernels_are_removed(source: str, unneeded: bool) -> None:
    assert bool(offline.UNNEEDED_KERNELS.search(source)) is unneeded
