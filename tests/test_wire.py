"""docs/wire.md beside the configs: its tables have every model's tensors, and no others."""

from __future__ import annotations

import re

import pytest
from tritonclient.grpc import model_config_pb2

from export.repository import read_config
from tests.conftest import ROOT

DOCUMENT = (ROOT / "docs" / "wire.md").read_text()
REPOSITORY = ROOT / "model_repository"
EMBEDDINGS = {"image_embed", "high_res_feats_0", "high_res_feats_1"}
"""Between models of one server: told in a sentence."""
LETTERS = {"S": 1008, "M": 288, "N": -1, "P": -1, "K": -1}

Tensors = dict[str, tuple[str, list[int], bool]]
"""By name: the type, the shape of one image, and whether it may be left out."""


def rows(section: str) -> list[list[str]]:
    text = DOCUMENT.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" |")] for line in lines if "---" not in line]


def documented(section: str, model: str) -> Tensors:
    header, *tensors = rows(section)
    column = header.index(f"`{model}`")
    return {
        name.strip("`"): (kind, dims(shape), cells[column - 3] == "optional")
        for name, kind, shape, *cells in tensors
        if cells[column - 3]
    }


def dims(shape: str) -> list[int]:
    batch, *rest = shape.strip("[]").split(", ")
    assert batch == "B"
    return [LETTERS[size] if size in LETTERS else int(size) for size in rest]


def kind(number: int) -> str:
    name = model_config_pb2.DataType.Name(number).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


@pytest.mark.parametrize("model", [cell.strip("`") for cell in rows("Inputs")[0][3:]])
def test_the_tables_match_the_models_configs(model: str) -> None:
    config = read_config(REPOSITORY, model)
    inputs: Tensors = {
        tensor.name: (kind(tensor.data_type), list(tensor.dims), tensor.optional)
        for tensor in config.input
        if tensor.name not in EMBEDDINGS
    }
    outputs: Tensors = {
        tensor.name: (kind(tensor.data_type), list(tensor.dims), False) for tensor in config.output
    }
    assert documented("Inputs", model) == inputs
    assert documented("Outputs", model) == outputs
