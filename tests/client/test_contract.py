"""The client's declaration against the model configurations it is meant for."""

from typing import Any

import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2

from tests.conftest import ROOT
from triton_sam3 import contract

REPOSITORY = ROOT / "model_repository"


def config(model: str) -> Any:
    text = (REPOSITORY / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors(described: Any) -> dict[str, tuple[str, int]]:
    """Name → Triton's wire type and number of axes, batch included."""
    types = model_config_pb2.DataType
    return {
        tensor.name: (
            types.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES"),
            1 + len(tensor.dims),
        )
        for tensor in described
    }


def declared(expected: tuple[contract.Tensor, ...]) -> dict[str, tuple[str, int]]:
    return {tensor.name: (tensor.datatype, len(tensor.axes)) for tensor in expected}


def test_the_ensemble_has_the_tensors_that_the_client_declares() -> None:
    served = config(contract.INTERACTIVE)
    assert tensors(served.input) == declared(contract.INTERACTIVE_INPUTS)
    assert tensors(served.output) == declared(contract.OUTPUTS)


def test_the_decoder_has_the_tensors_that_a_click_needs() -> None:
    served = config(contract.DECODER)
    inputs = tensors(served.input)
    of_a_click = declared((contract.IMAGE_ID, *contract.PROMPTS))
    assert {name: inputs.get(name) for name in of_a_click} == of_a_click
    assert tensors(served.output) == declared(contract.OUTPUTS)


@pytest.mark.parametrize("model", [contract.INTERACTIVE, contract.ENCODER, contract.DECODER])
def test_models_are_named_like_their_folders(model: str) -> None:
    assert config(model).name == model


def test_flags_are_optional() -> None:
    for model in (contract.INTERACTIVE, contract.DECODER):
        optional = {tensor.name for tensor in config(model).input if tensor.optional}
        assert {
            contract.MASK_INPUT.name,
            contract.MULTIMASK_OUTPUT.name,
            contract.BEST_ONLY.name,
            contract.KEEP_IMAGE.name,
        } <= optional


def test_the_decoders_config_has_the_limits() -> None:
    parameters = config(contract.DECODER).parameters
    assert int(parameters[contract.MAX_OBJECTS].string_value) > 0
    assert int(parameters[contract.MAX_TOKENS].string_value) > 0
