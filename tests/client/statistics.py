"""How often the models of a server ran, by Triton's own count."""

import tritonclient.grpc

from server import TritonServer
from triton_sam3 import contract


def inferences(server: TritonServer, model: str) -> int:
    """Successful inferences of `model` since the server started."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    try:
        answer = client.get_inference_statistics(model, as_json=True)
    finally:
        client.close()
    return int(answer["model_stats"][0].get("inference_count", 0))


def encodings(server: TritonServer) -> int:
    """Images the encoder has encoded."""
    return inferences(server, contract.ENCODER)


def decodings(server: TritonServer) -> int:
    """Requests the decoder has answered."""
    return inferences(server, contract.DECODER)
