"""What a server says about itself."""

import dataclasses

import pytest

from server import TritonServer
from tests.client import misbehaving
from triton_sam3 import AsyncClient, Client, ServerError, ServerUnreachable
from triton_sam3.status import MODELS, store_metrics


async def test_a_ready_server(url: str) -> None:
    with Client(url) as client:
        found = client.status()
    assert (found.server, found.ready, found.url) == ("triton", True, url)
    assert tuple(model.name for model in found.models) == MODELS
    assert all(model.versions == ("1",) for model in found.models)
    assert found.served is not None
    assert found.served.image_side % 14 == 0
    assert found.served.mask_side == found.served.image_side // 14 * 4
    async with AsyncClient(url) as client_async:
        assert dataclasses.asdict(await client_async.status()) == dataclasses.asdict(found)


def test_a_server_without_the_models_is_not_ready() -> None:
    missing = b'{"error": "Request for unknown model: \'x\' is not found"}'
    answers = (200, misbehaving.METADATA), (404, missing)
    with misbehaving.http(*answers) as (url, _), Client(url) as client:
        found = client.status()
    assert not found.ready
    assert found.served is None
    assert [model.versions for model in found.models] == [(), (), ()]


@pytest.mark.parametrize("page", [b'{"versions": 5}', b'{"versions": {}, "config": [1]}'])
def test_another_ready_server_is_named(page: bytes) -> None:
    expected_error = pytest.raises(ServerError, match="has no input 'image'")
    with misbehaving.http((200, page)) as (url, _), Client(url) as client, expected_error:
        client.status()


def test_metrics_of_kept_images_are_read(server: TritonServer) -> None:
    metrics = store_metrics(server.metrics_url, 10.0)
    assert metrics
    assert all(name.startswith("sam3_") for name in metrics)


def test_metrics_are_numbers_by_name() -> None:
    page = (
        b"# HELP sam3_kept_images Images kept\n# TYPE sam3_kept_images gauge\n"
        b'sam3_kept_images{model="sam3_prompt_decoder",version="1"} 3.000000\n'
        b'sam3_kept_images{model="sam3_prompt_decoder",version="2"} 1\n'
        b'nv_inference_count{model="x"} 9\nsam3_kept_bytes 1.5e+07\n'
        b'sam3_objects_bucket{le="1"} 4\nsam3_objects_bucket{le="+Inf"} 5\n'
    )
    with misbehaving.http((200, page)) as (url, _):
        assert store_metrics(url, 10.0) == {"sam3_kept_images": 4.0, "sam3_kept_bytes": 1.5e7}


def test_a_metrics_url_with_another_port_is_server_unreachable(server: TritonServer) -> None:
    url = f"{server.grpc_url.replace('grpc', 'http')}/metrics"
    with pytest.raises(ServerUnreachable, match=f"no metrics from {url}"):
        store_metrics(url, 5.0)


def test_metrics_are_not_requested_through_a_proxy(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{misbehaving.unused_port()}")
    assert store_metrics(server.metrics_url, 10.0)


def test_missing_metrics_are_an_error() -> None:
    url = f"http://127.0.0.1:{misbehaving.unused_port()}/metrics"
    with pytest.raises(ServerUnreachable, match=f"no metrics from {url}"):
        store_metrics(url, 1.0)


@pytest.mark.parametrize("url", ["nonsense", "file:///etc/hostname", "127.0.0.1:8002/metrics"])
def test_metrics_come_over_http(url: str) -> None:
    with pytest.raises(ValueError, match="is not a metrics URL; use http://host:8002/metrics"):
        store_metrics(url, 1.0)


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_proxys_answer_does_not_make_a_model_unready(status: int) -> None:
    """Over HTTP tritonclient tells whether a model is ready by the status alone."""
    ready = (200, misbehaving.METADATA)
    # Asked only if all are ready.
    expected_error = pytest.raises(ServerError, match="has no input 'image'")
    answers = (ready, ready, (status, b"busy"), ready)
    with misbehaving.http(*answers) as (url, _), Client(url) as client, expected_error:
        client.status()


def test_a_status_is_never_remembered(url: str) -> None:
    """The server may have been restarted with a model of another size."""
    with Client(url) as client:
        found = client.status()
        assert found.served is not None
        client._engine._served = dataclasses.replace(found.served, image_side=14)
        assert client.status() == found
