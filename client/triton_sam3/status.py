"""The status of a server, for people and probes."""

import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass

from . import contract
from .endpoint import reject_secrets
from .engine import Engine
from .errors import ModelUnavailable, ServerUnreachable
from .flow import Flow, Query, Sleep
from .protocol import ServedModel

MODELS = (contract.INTERACTIVE, contract.ENCODER, contract.DECODER)

_READY_PAUSE = 0.5
"""Seconds before a model that is not ready is asked once more."""

_METRIC = re.compile(r"^(sam3_\w+)(?<!_bucket)(?:\{[^}]*\})? (\S+)", re.MULTILINE)
"""A line of Prometheus' text format: the models' own metrics, except histogram buckets."""


@dataclass(frozen=True)
class ModelStatus:
    """One of the three models: its versions on the server, and whether it is ready."""

    name: str
    versions: tuple[str, ...]
    ready: bool


@dataclass(frozen=True)
class ServerStatus:
    """A server's name, version and models.

    served: sizes and limits; None unless all models are ready.
    """

    url: str
    server: str
    version: str
    models: tuple[ModelStatus, ...]
    served: ServedModel | None

    @property
    def ready(self) -> bool:
        """Whether all models are ready."""
        return all(model.ready for model in self.models)


def status(engine: Engine, url: str) -> Flow[ServerStatus]:
    """Query everything in `ServerStatus`."""
    server = yield from engine.retries.send(Query("get_server_metadata"))
    models: list[ModelStatus] = []
    for name in MODELS:
        models.append((yield from _model(engine, name)))
    served = None
    if all(model.ready for model in models):
        engine.forget_served()  # another export may be served by now
        served = yield from engine.served()
    return ServerStatus(
        url=url,
        server=str(server.get("name", "")),
        version=str(server.get("version", "")),
        models=tuple(models),
        served=served,
    )


def _model(engine: Engine, name: str) -> Flow[ModelStatus]:
    is_ready = Query("is_model_ready", (name,))
    try:
        metadata = yield from engine.retries.send(Query("get_model_metadata", (name,)))
        ready = yield from engine.retries.send(is_ready)
        if not ready:  # over HTTP a busy proxy's answer looks the same
            yield Sleep(_READY_PAUSE)
            ready = yield from engine.retries.send(is_ready)
    except ModelUnavailable:
        return ModelStatus(name, (), False)
    versions = metadata.get("versions")
    known = tuple(map(str, versions)) if isinstance(versions, list) else ()
    return ModelStatus(name, known, bool(ready))


def store_metrics(metrics_url: str, timeout: float) -> dict[str, float]:
    """The models' own metrics (kept images, hits, evictions …) from Triton's metrics endpoint.

    metrics_url: http://host:8002/metrics. Values of one name, as of several decoders, are summed;
    proxy environment variables are ignored. Raises ServerUnreachable if nothing answers there, and
    ValueError for another kind of URL, and one with a user name or a query.
    """
    reject_secrets(metrics_url)
    if not metrics_url.startswith(("http://", "https://")):
        raise ValueError(f"{metrics_url!r} is not a metrics URL; use http://host:8002/metrics")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(metrics_url, timeout=timeout) as answer:
            text = answer.read().decode()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerUnreachable(
            f"no metrics from {metrics_url}: {error}; Triton serves them at "
            "http://host:8002/metrics unless started with --allow-metrics=false"
        ) from error
    metrics: dict[str, float] = {}
    for name, value in _METRIC.findall(text):
        metrics[name] = metrics.get(name, 0.0) + float(value)
    return metrics
