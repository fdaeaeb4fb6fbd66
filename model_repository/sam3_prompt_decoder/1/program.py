"""Reading `decoder.pt2` (see export/decoder.py) onto a device."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule

Program = Callable[..., tuple[Tensor, Tensor]]

TORCH_VERSION = "torch_version"
"""Extra file in which the exporter records the torch version that wrote the program."""

NO_MEMORY = ("can't allocate", "out of memory", "ALLOC_FAILED")
"""Parts of the messages of torch's CPU allocator, of CUDA for page-locked memory and graphs, and of
cuBLAS, none of which has an exception type of its own."""


class ProgramError(Exception):
    """A program that cannot be used; the message says why and what to do."""


def load_program(path: Path, device: torch.device) -> ExportedProgram:
    """Read a program and move it to `device`. Raises `ProgramError`."""
    if not path.is_file():
        raise ProgramError(
            f"there is no {path.name} in the model's version folder; build the model repository "
            "with: python -m export"
        )
    _check_intact(path)
    program = _read(path)
    if device.type != "cpu":
        # The device that it was traced on is baked into weights, constants and nodes.
        try:
            program = move_to_device_pass(program, device)
        except RuntimeError as error:
            raise does_not_run(device, error) from error
    return program


def bind(program: ExportedProgram) -> Program:
    """The program as a function of its named inputs that does not check shapes.

    This modifies the program: call its `module()` first if you need it. A module looks up each
    weight at every call, and its `torch.cond` goes through the dispatcher: a fifth of a small
    decode.
    """
    module = program.graph_module
    for node in module.graph.nodes:
        if node.target is torch.ops.higher_order.cond:
            node.target = _branch
    module.recompile()
    kept = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    names = [spec.arg.name for spec in specs if spec.target is None]
    run = partial(module.forward, *(kept[spec.target] for spec in specs if spec.target is not None))
    return lambda **inputs: run(*(inputs[name] for name in names))


def _branch(
    condition: bool, if_true: GraphModule, if_false: GraphModule, operands: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What `torch.cond` amounts to."""
    result: tuple[Tensor, ...] = (if_true if condition else if_false)(*operands)
    return result


def _check_intact(path: Path) -> None:
    """Verify checksums, which torch does not do: a damaged weight would merely give wrong masks."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        damage = member and f"the checksum of {member} in it does not match"
    except PermissionError as error:
        raise ProgramError(
            f"the server's user may not read {path.name}; fix it with: chmod o+r"
        ) from error
    except (OSError, zipfile.BadZipFile, zlib.error):
        return  # reading it gives a better message
    except Exception as error:  # a damaged table of contents can break zipfile anywhere
        damage = first_line(error)
    if damage:
        raise ProgramError(f"{path.name} is damaged: {damage}; copy or export it again")


def _read(path: Path) -> ExportedProgram:
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged or newer file can break the reader anywhere
        raise ProgramError(
            f"{path.name} cannot be read by torch {torch.__version__} ({first_line(error)}); it "
            f"{_origin(path)}; export it again with a torch that is not newer than this one"
        ) from error


def _origin(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith(f"/extra/{TORCH_VERSION}"))
            return f"was written by torch {archive.read(name).decode()}"
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError):
        return "is damaged or not an exported program"


def first_line(error: Exception) -> str:
    """The part of an error message that fits into a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def does_not_run(device: torch.device, error: Exception) -> ProgramError:
    """The error for what fails on the device itself."""
    return ProgramError(
        f"the decoder does not run on {device} ({first_line(error)}); check what else uses it, "
        "and whether this build of torch supports it"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the host ran out of memory."""
    typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return typed or any(words in str(error) for words in NO_MEMORY)
