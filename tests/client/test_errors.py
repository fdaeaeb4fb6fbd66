"""The exception tree is what its module's picture shows, and fits code that catches built-ins."""

import inspect
import re

import pytest

from triton_sam3 import errors

CLASSES = {
    name: cls
    for name, cls in vars(errors).items()
    if inspect.isclass(cls) and issubclass(cls, Exception)
}


def drawn_tree() -> dict[str, str | None]:
    """Read the picture: each class and the one it hangs from."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^((?:│   |    )*)(├── |└── )?([A-Z]\w+)", line)
        if match is None or match[3] not in CLASSES:
            continue
        depth = len(match[1]) // 4 + bool(match[2])
        path[depth:] = [match[3]]
        parents[match[3]] = path[depth - 1] if depth else None
    return parents


def test_the_module_docstring_shows_every_class_under_its_base() -> None:
    drawn = drawn_tree()
    assert set(drawn) == set(CLASSES)
    for name, parent in drawn.items():
        assert CLASSES[name].__bases__[0].__name__ == (parent or "Exception")


@pytest.mark.parametrize(
    ("name", "built_in"),
    [
        ("PromptError", ValueError),
        ("ImageError", ValueError),
        ("ServerUnreachable", ConnectionError),
        ("DeadlineExceeded", TimeoutError),
    ],
)
def test_errors_can_be_caught_as_built_in_exceptions(name: str, built_in: type[Exception]) -> None:
    with pytest.raises(built_in, match="what went wrong") as caught:
        raise CLASSES[name]("what went wrong")
    assert isinstance(caught.value, errors.SAM3Error)
    assert str(caught.value) == "what went wrong"
