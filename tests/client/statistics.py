"""How often the models of a server ran, by Triton's own count."""

import time

import tritonclient.grpc

from server import TritonServer
from triton_sam3 import contract

STANDS_STILL_SECONDS = 0.1
"""Triton counts after it has answered: on a busy machine, a client was there before the count."""


def inferences(server: TritonServer, model: str) -> int:
    """Successful inferences of `model` since the server started, once the count stands still."""
    return _standing_still(server, model, "inference_count")


def executions(server: TritonServer, model: str) -> int:
    """How often they ran, many of them together or not."""
    return _standing_still(server, model, "execution_count")


def _standing_still(server: TritonServer, model: str, name: str) -> int:
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    try:
        before, count = -1, _count(client, model, name)
        while before != count:
            time.sleep(STANDS_STILL_SECONDS)
            before, count = count, _count(client, model, name)
    finally:
        client.close()
    return count


def _count(client: tritonclient.grpc.InferenceServerClient, model: str, name: str) -> int:
    answer = client.get_inference_statistics(model, as_json=True)
    return int(answer["model_stats"][0].get(name, 0))


def encodings(server: TritonServer) -> int:
    """Images the encoder has encoded."""
    return inferences(server, contract.ENCODER)


def decodings(server: TritonServer) -> int:
    """Requests the decoder has answered."""
    return inferences(server, contract.DECODER)
