"""The relevant part of a tritonserver log: which model failed, and why."""

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
_TRANSIENT = "boost::interprocess::lock_exception"
_NOEXEC = "failed to map segment from shared object"
_NOEXEC_CAUSE = "The folder for temporary files is mounted noexec: set TMPDIR to another folder."
_DEAD_STUB = "is not healthy"
_DEAD_STUB_CAUSE = "Its process exited while loading: it crashed or ran out of memory."


def explain(log: str) -> str:
    """One line per model that failed to load, or else the errors, or else the last lines."""
    lines = log.splitlines()
    failures = [match for line in lines if (match := _LOAD_FAILURE.search(line))]
    if failures:
        return "\n".join(f"{match['model']}: {_reason(match['reason'])}" for match in failures)
    matches = [match for line in lines for form in _PROBLEMS if (match := form.match(line))]
    problems = [match[1] for match in matches if not any(noise in match[1] for noise in _NOISE)]
    return "\n".join(dict.fromkeys(problems)) or tail(log)


def is_doomed(log: str) -> bool:
    """Whether an endpoint could not be opened: Triton then exits only slowly, or keeps serving."""
    return "failed to start " in log


def is_transient(text: str) -> bool:
    """Whether tritonserver exited over a transient failure of its Python backend: start it again.

    Seen while stubs start on a busy machine; the same exception as in
    https://github.com/triton-inference-server/server/issues/8882
    """
    return _TRANSIENT in text


def tail(log: str) -> str:
    """The last lines of a log."""
    return "\n".join(log.splitlines()[-_TAIL_LINES:])


def _reason(text: str) -> str:
    """Strip what Triton adds to a message: quoting, error code, Python traceback."""
    text = _ERROR_CODE.sub("", text.replace("\\n", "\n").replace('\\"', '"'))
    sentence, _, origin = text.partition("\n\nAt:\n")
    if sentence.startswith("TritonModelException: "):  # the model's own message to users
        return sentence.removeprefix("TritonModelException: ").strip()
    if _DEAD_STUB in sentence:
        sentence = f"{sentence} {_DEAD_STUB_CAUSE}"
    if _NOEXEC in sentence:
        sentence = f"{sentence} {_NOEXEC_CAUSE}"
    return "\n".join([sentence.strip(), *origin.rstrip().splitlines()])
