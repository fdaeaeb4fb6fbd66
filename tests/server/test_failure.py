import pytest

from server.failure import explain

START = """\
W1122 11:08:44.421122 5110 pinned_memory_manager.cc:273] "Unable to allocate pinned memory"
E1122 11:08:44.421273 5110 server.cc:241] "CudaDriverHelper has not been initialized."
"""
END = """\
I1122 11:08:44.424384 5110 server.cc:321] "Timeout 5: Found 0 model versions"
error: creating server: Internal - failed to load all models
"""


def failed(model: str, reason: str) -> str:
    return (
        "E1122 11:09:18.512667 5465 model_lifecycle.cc:642] "
        f"\"failed to load '{model}' version 1: {reason}\""
    )


@pytest.mark.parametrize(
    ("lines", "explanation"),
    [
        pytest.param(
            failed(
                "encoder",
                r"Internal: TritonModelException: there is no model.onnx\n\nAt:\n"
                r"  /tmp/backends/onnxruntime/model.py(12): initialize\n",
            ),
            "encoder: there is no model.onnx",
            id="a model's own sentence",
        ),
        pytest.param(
            failed("decoder", r"Internal: KeyError: 'x'\n\nAt:\n  /m/1/model.py(3): initialize\n"),
            "decoder: KeyError: 'x'\n  /m/1/model.py(3): initialize",
            id="a bug, with where it is",
        ),
        pytest.param(
            failed("a", "Internal: Stub process 'a_0_0' is not healthy.")
            + "\n"
            + failed("b", "Invalid argument: ensemble 'b' depends on 'a'"),
            "a: Stub process 'a_0_0' is not healthy. Its process exited while loading: it crashed "
            "or ran out of memory.\n"
            "b: ensemble 'b' depends on 'a'",
            id="two models",
        ),
        pytest.param(
            failed("a", "Not found: unable to load x.so: failed to map segment from shared object"),
            "a: unable to load x.so: failed to map segment from shared object The folder for "
            "temporary files is mounted noexec: set TMPDIR to another folder.",
            id="a folder mounted noexec",
        ),
        pytest.param(
            "[libprotobuf ERROR /x/text_format.cc:337] Error parsing text-format: 2:17: x4\n"
            "E1122 11:27:46.4 13206 repository.cc:1460] \"Poll failed for model directory 'm'\"",
            "Error parsing text-format: 2:17: x4\nPoll failed for model directory 'm'",
            id="a config that cannot be read",
        ),
    ],
)
def test_messages_are_reduced_to_the_reason(lines: str, explanation: str) -> None:
    assert explain(f"{START}{lines}\n{END}") == explanation


def test_an_unknown_option() -> None:
    log = "/opt/bin/tritonserver: unrecognized option '--nosuch'\nUsage: tritonserver [options]\n"
    assert explain(log) == "unrecognized option '--nosuch'"


def test_without_an_error_the_last_lines_are_shown() -> None:
    log = "\n".join(f"line {i}" for i in range(100))
    assert explain(log).splitlines() == [f"line {i}" for i in range(85, 100)]
