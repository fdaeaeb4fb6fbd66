from typing import Any

import pytest

from benchmarks.anatomy import Recording, read_trace, summarise

MS = 1_000_000


Events = list[dict[str, Any]]


def event(number: int, name: str, milliseconds: float) -> dict[str, Any]:
    return {"id": number, "timestamps": [{"name": name, "ns": int(milliseconds * MS)}]}


def model(
    number: int, name: str, start: float, *, parent: int | None = None
) -> list[dict[str, Any]]:
    """A model's share of a trace: queued 1 ms, read 1 ms, computed 10 ms, written 2 ms."""
    head: dict[str, Any] = {"id": number, "model_name": name, "model_version": 1}
    if parent is not None:
        head["parent_id"] = parent
    moments = {"REQUEST_START": 0, "QUEUE_START": 0, "COMPUTE_START": 1, "COMPUTE_INPUT_END": 2}
    moments |= {"COMPUTE_OUTPUT_START": 12, "COMPUTE_END": 14, "REQUEST_END": 14}
    return [head, *(event(number, moment, start + at) for moment, at in moments.items())]


def edge(number: int, arrived: float, left: float) -> Events:
    return [
        event(number, "GRPC_WAITREAD_START", 0),
        event(number, "GRPC_WAITREAD_END", arrived),
        event(number, "GRPC_SEND_START", left),
        event(number, "GRPC_SEND_END", left + 1),
    ]


CLICK = [*model(5, "decoder", 103), *edge(5, arrived=102, left=116)]
ONE_SHOT = [
    *model(8, "decoder", 118, parent=6),
    *model(7, "encoder", 103, parent=6),
    {"id": 6, "model_name": "ensemble", "model_version": 1},
    event(6, "REQUEST_START", 102),
    event(6, "REQUEST_END", 133),
    *edge(6, arrived=102, left=131),
]


def test_the_edge_stands_apart_from_the_models() -> None:
    moments = read_trace(ONE_SHOT)
    assert set(moments) == {"", "encoder", "decoder"}
    assert moments["encoder"]["COMPUTE_START"] == 104 * MS
    assert moments[""]["GRPC_WAITREAD_END"] == 102 * MS


@pytest.mark.parametrize(("trace", "models"), [(CLICK, 1), (ONE_SHOT, 2)])
def test_phases_fill_the_whole_request_without_gap_or_overlap(trace: Events, models: int) -> None:
    recording = Recording(100 * MS, 101 * MS, 140 * MS, 145 * MS, read_trace(trace))
    phases = recording.phases()
    assert sum(length for *_, length in phases) == 45 * MS
    assert all(length >= 0 for *_, length in phases)
    assert [what for _, what, _ in phases].count("compute") == models
    assert phases[0] == ("client", "prepare the request", MS)
    assert phases[-1] == ("client", "finish the masks", 5 * MS)


def test_between_two_models_time_belongs_to_the_server() -> None:
    recording = Recording(100 * MS, 101 * MS, 140 * MS, 145 * MS, read_trace(ONE_SHOT))
    assert ("server", "between the models", MS) in recording.phases()


def test_a_summary_takes_the_median_of_each_phase_and_of_the_whole() -> None:
    recordings = [
        Recording(called * MS, 101 * MS, 140 * MS, finish * MS, read_trace(CLICK))
        for called, finish in ((90, 141), (99, 150), (100, 142))
    ]
    anatomy = summarise("a click", recordings)
    assert anatomy.phases[0].milliseconds == anatomy.phases[-1].milliseconds == 2
    assert anatomy.largest.what == "answer to the client"
    assert sum(phase.milliseconds for phase in anatomy.phases) == 43
    assert anatomy.milliseconds == 51
