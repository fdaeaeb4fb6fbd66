"""The readable part of a tritonserver log: which model failed, and why."""

import re

_LOAD_FAILURE = re.compile(r"""failed to load '(?P<model>[^']+)' version \S+: (?P<reason>.*)"$""")
_PROBLEMS = (
    re.compile(r'^E\d{4} \S+ \d+ \S+\] "?(.*?)"?$'),
    re.compile(r"^\[libprotobuf ERROR [^\]]*\] (.*)$"),
    re.compile(r"^error: (.*)$"),
    re.compile(r"^\S*tritonserver: (.*)$"),  # an option it does not know
)
_NOISE = ("CudaDriverHelper", "failed to load all models")
_TAIL_LINES = 15
_ERROR_CODE = re.compile(r"^(?:Internal|Invalid argument|Unavailable|Not found|Unsupported): ")
_CHANCE = "boost::interprocess::lock_exception"
_NOEXEC = "failed to map segment from shared object"
_NOEXEC_CAUSE = "Temporary files lie where none may be executed: set TMPDIR to another folder."
_DEAD_STUB = "is not healthy"
_DEAD_STUB_CAUSE = "Its process ended while loading: it crashed, or was killed for want of memory."


def explain(log: str) -> str:
    """One line per model that failed to load; else the errors; else the last lines."""
    lines = log.splitlines()
    failures = [match for line in lines if (match := _LOAD_FAILURE.search(line))]
    if failures:
        return "\n".join(f"{match['model']}: {_reason(match['reason'])}" for match in failures)
    matches = [match for line in lines for form in _PROBLEMS if (match := form.match(line))]
    told = [match[1] for match in matches if not any(noise in match[1] for noise in _NOISE)]
    return "\n".join(dict.fromkeys(told)) or tail(log)


def is_doomed(log: str) -> bool:
    """Whether an endpoint could not be opened: Triton takes its time to end, or serves on."""
    return "failed to start " in log


def is_chance(text: str) -> bool:
    """Whether tritonserver ended by an accident of its Python backend, which another start avoids.

    Seen while stubs start on a busy machine; the same exception as in
    https://github.com/triton-inference-server/server/issues/8882
    """
    return _CHANCE in text


def tail(log: str) -> str:
    """The last lines."""
    return "\n".join(log.splitlines()[-_TAIL_LINES:])


def _reason(text: str) -> str:
    """Without what Triton wraps around a sentence: quoting, error code, Python traceback."""
    text = _ERROR_CODE.sub("", text.replace("\\n", "\n").replace('\\"', '"'))
    sentence, _, origin = text.partition("\n\nAt:\n")
    if sentence.startswith("TritonModelException: "):  # written for people by the model itself
        return sentence.removeprefix("TritonModelException: ").strip()
    if _DEAD_STUB in sentence:
        sentence = f"{sentence} {_DEAD_STUB_CAUSE}"
    if _NOEXEC in sentence:
        sentence = f"{sentence} {_NOEXEC_CAUSE}"
    return "\n".join([sentence.strip(), *origin.rstrip().splitlines()])
