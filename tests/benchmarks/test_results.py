from pathlib import Path

import pytest

from benchmarks.results import write_section


def test_a_new_section_goes_to_the_end(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nWords.\n")
    write_section("first", "## One", page)
    write_section("second-part", "## Two\n", page)
    assert page.read_text() == (
        "# Results\n\nWords.\n\n"
        "<!-- first -->\n## One\n<!-- /first -->\n\n"
        "<!-- second-part -->\n## Two\n<!-- /second-part -->\n"
    )


def test_rewriting_leaves_everything_else_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    for name, text in (("a", "old a"), ("b", "old b"), ("a", r"new a with \1 and \g<0>")):
        write_section(name, text, page)
    before = page.read_text()
    assert before == (
        "<!-- a -->\nnew a with \\1 and \\g<0>\n<!-- /a -->\n\n<!-- b -->\nold b\n<!-- /b -->\n"
    )
    write_section("b", "old b", page)
    assert page.read_text() == before


@pytest.mark.parametrize(
    "text",
    ["<!-- a -->\nx\n", "x\n<!-- /a -->\n", "<!-- /a -->\nx\n<!-- a -->\n", "<!-- a -->\n" * 2],
)
def test_a_page_with_broken_markers_is_left_alone(text: str, tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="are not paired"):
        write_section("a", "new", page)
    assert page.read_text() == text


def test_a_section_cannot_hold_its_own_marker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="own markers"):
        write_section("a", "text <!-- /a -->", tmp_path / "RESULTS.md")
