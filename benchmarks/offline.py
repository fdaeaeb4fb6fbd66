"""Transfer the GPU benchmark to a machine without a network, in parts of any size.

    python -m benchmarks.offline pack build/offline --python 3.12 --gpu 90          here
    python3 -m benchmarks.offline unpack build/offline /tmp/env                     there

The machine has this checkout, a Python of that version, PyTorch for CUDA, torchvision, and what a
machine for PyTorch usually has: onnx, onnxscript, scikit-image, timm, typer, grpcio, pytest. The
rest is packed: `python`, for exporting, testing and timing models in process, and `server`, each a
tar.xz in numbered parts. It includes only those of ONNX Runtime's kernels that this encoder may
need on GPUs of one architecture, a twentieth of them. Parts may arrive one by one: `unpack`
installs the packs that are complete, says what the others lack, and can be rerun when more have
arrived. It creates an environment in which the packs take precedence over the machine's own
packages, and prints what to set in the shell. pip is not needed there.

Run the tests marked gpu by file; other test files import packages that are not packed:

    python3 -m pytest -m gpu tests/model_repository/sam3_prompt_decoder/test_gpu.py \\
        tests/client/test_shared_memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import io
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import fat_binaries

PYTHON = (
    *("numpy", "protobuf", "tritonclient", "python-rapidjson", "gevent", "greenlet", "brotli"),
    *("geventhttpclient", "zope.event", "zope.interface", "sam3", "pycocotools", "ftfy", "wcwidth"),
    *("iopath", "nvidia-pytriton"),
)
"""Packed in the versions that are installed here."""
ONNXRUNTIME = "onnxruntime-gpu==1.30.0"
"""For CUDA 13, whose libraries come with the machine's PyTorch."""
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17, 5)),
    "manylinux2014_x86_64",  # the older names are separate tags
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
)
TRITON = ("pytriton/__init__.py", "pytriton/tritonserver/", "nvidia_pytriton")
SERVER = ("pytriton/", "nvidia_pytriton.libs/")
CUDA_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
UNNEEDED_FILES = (
    *("onnxruntime/transformers/", "onnxruntime/tools/", "onnxruntime/quantization/"),
    "onnxruntime/capi/libonnxruntime.so",  # for other languages than Python
)
UNNEEDED_KERNELS = re.compile(
    r"moe_|fp4|xqa|masked_multihead|fmha_sm(50|70|75)|flash_fwd(?!_(split_)?hdim64_fp16_sm80_cu)"
)
"""Mixtures of experts, attention for language models, and flash attention other than in FP16 with
heads of 64: by far the most kernels."""
CHECK = """
import warnings; warnings.filterwarnings("ignore")
import numpy, onnx, onnxruntime, skimage.data, torch, torchvision, tritonclient.grpc
import sam3, server.installation as installation
from pathlib import Path; from tempfile import mkdtemp
try: installation.find(Path(mkdtemp()), {})
except Exception as error: print("# no server yet:", error)
print("# numpy", numpy.__version__, "torch", torch.__version__, "onnx", onnx.__version__)
print("# onnxruntime", onnxruntime.__version__, onnxruntime.get_available_providers())
print("# GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
"""


def pack(folder: Path, python: str, gpu: int, part_bytes: int) -> None:
    """Download the wheels for a Python and a GPU, and write both packs as parts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    installed = [f"{name}=={metadata.version(name)}" for name in PYTHON]
    with TemporaryDirectory() as scratch:
        for requirement in (*installed, ONNXRUNTIME):
            _fetch(requirement, python, Path(scratch) / "wheels")
        tree = _unpacked(sorted((Path(scratch) / "wheels").glob("*.whl")), python, Path(scratch))
        fat_binaries.prune(tree / CUDA_PROVIDER, gpu, lambda n: bool(UNNEEDED_KERNELS.search(n)))
        for name, for_server in (("python", False), ("server", True)):
            _write(folder, name, _archive(tree, for_server), part_bytes)


def _write(folder: Path, name: str, archive: bytes, part_bytes: int) -> None:
    parts = split(archive, part_bytes)
    for number, part in enumerate(parts):
        (folder / f"{name}.tar.xz.{number:02}").write_bytes(part)
    digest = hashlib.sha256(archive).hexdigest()
    (folder / f"{name}.txt").write_text(f"{len(parts)} {digest}\n")
    print(f"{name}: {len(archive) / 2**20:.0f} MiB in {len(parts)} parts")


def _fetch(requirement: str, python: str, folder: Path) -> None:
    """Fetch a wheel for that Python; packages that PyPI has only as source must be pure Python."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    target = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms]
    done = subprocess.run([*pip, "download", *target, f"--dest={folder}", requirement], check=False)
    if done.returncode:
        build = [*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", requirement]
        subprocess.run(build, check=True)


def _unpacked(wheels: list[Path], python: str, scratch: Path) -> Path:
    """Extract the part of the wheels that goes into site-packages."""
    tree = scratch / "tree"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as content:
            for item in content.infolist():
                if not item.is_dir() and wanted(item.filename, python):
                    path = Path(content.extract(item, tree))
                    path.chmod((item.external_attr >> 16) & 0o755 | 0o600)
    return tree


def _archive(tree: Path, for_server: bool) -> bytes:
    """The server's files, or all others, as a tar.xz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            name = str(path.relative_to(tree))
            if name.startswith(SERVER) is for_server:
                archive.add(path, name)
    return buffer.getvalue()


def wanted(name: str, python: str) -> bool:
    """Whether to pack a file: the server and one Python's stub of nvidia-pytriton, and the parts of
    ONNX Runtime that run graphs.

    nvidia-pytriton's metadata is in the Python pack: benchmarks report its version.
    """
    if name.startswith(("pytriton/", "nvidia_pytriton")):
        stub = "python_backend_stubs/" not in name or f"/{python}/" in name
        return name.startswith(TRITON) and stub and "/libpython3-" not in name
    return not name.startswith(UNNEEDED_FILES)


def split(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


def join(folder: Path, name: str) -> bytes:
    """Join a pack's parts. Raises ValueError with what is missing or damaged."""
    count, digest = (folder / f"{name}.txt").read_text().split()
    paths = [folder / f"{name}.tar.xz.{number:02}" for number in range(int(count))]
    if missing := [path.name for path in paths if not path.exists()]:
        raise ValueError(f"{name} is incomplete: copy {', '.join(missing)} too")
    content = b"".join(path.read_bytes() for path in paths)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"{name} is damaged: parts are truncated or belong to another pack; pack it again"
        )
    return content


def unpack(folder: Path, environment: Path) -> None:
    """Create or extend the environment, check it, and print what to set in the shell."""
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python3"
    packages = next((environment / "lib").glob("python3*/site-packages"))
    system = Path(sysconfig.get_paths()["purelib"])
    (packages / "machine.pth").write_text(f"import site; site.addsitedir({str(system)!r})\n")
    for name in sorted(path.stem for path in folder.glob("*.txt")):
        try:
            with tarfile.open(fileobj=io.BytesIO(join(folder, name))) as archive:
                archive.extractall(packages, filter="tar")
        except ValueError as error:
            print(f"# {error}")
    # ONNX Runtime looks for CUDA's libraries next to itself; Triton for the driver by this name.
    for link, target in ((packages / "nvidia", system / "nvidia"), *_driver(environment)):
        if target.exists() and not link.exists():
            link.symlink_to(target)
    lines = [
        f"export PATH={python.parent.resolve()}:$PATH",
        f"export LD_LIBRARY_PATH={environment.resolve()}/driver:$LD_LIBRARY_PATH",
        "export PYTHONPATH=$PWD/client:$PWD",
    ]
    print("\n".join(lines), flush=True)
    subprocess.run([python, "-c", CHECK], check=True)


def _driver(environment: Path) -> Iterator[tuple[Path, Path]]:
    """A link to the GPU's driver under its name without a version, and the link's target."""
    folder = environment / "driver"
    folder.mkdir(exist_ok=True)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        print("# this machine has no NVIDIA driver (libcuda.so.1)")
        return
    mapped = Path("/proc/self/maps").read_text().split()
    yield folder / "libcuda.so", Path(next(word for word in mapped if "/libcuda.so" in word))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    packing, unpacking = commands.add_parser("pack"), commands.add_parser("unpack")
    for command in (packing, unpacking):
        command.add_argument("folder", type=Path, help="folder of the parts")
    packing.add_argument("--python", default="3.12", help="Python version on the machine")
    packing.add_argument(
        "--gpu", type=int, default=90, help="GPU architecture, such as 90 for sm_90"
    )
    packing.add_argument("--part-mib", type=int, default=45)
    unpacking.add_argument("environment", type=Path, help="folder to create")
    given = parser.parse_args()
    if given.command == "pack":
        pack(given.folder, given.python, given.gpu, given.part_mib * 2**20)
    else:
        unpack(given.folder, given.environment)


if __name__ == "__main__":
    main()
