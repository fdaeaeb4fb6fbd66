"""The command line against the real server."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from server import TritonServer
from tests.client import misbehaving
from triton_sam3 import Client, Segmentation, ServerError, cli
from triton_sam3.cli import BAD_INPUT, FAILED, SOME_FAILED, app
from triton_sam3.status import ModelStatus, ServerStatus

POINT, BOX = ["--point", "110,80"], ["--box", "95,60,140,110"]


@pytest.fixture
def photo(coins: NDArray[np.uint8], tmp_path: Path) -> Path:
    path = tmp_path / "coins.png"
    Image.fromarray(coins).save(path)
    return path


def invoke(*arguments: Any, url: str | None = None) -> Result:
    more = ["--url", url] if url else []
    return CliRunner().invoke(app, [*map(str, arguments), *more])


def test_segment_prints_what_the_client_answers(url: str, photo: Path) -> None:
    result = invoke("segment", photo, *POINT, "--point", "60,200,0", *BOX, "--json", url=url)
    assert result.exit_code == 0, result.output
    with Client(url) as client:
        expected = client.segment(photo, [(110, 80), (60, 200, False)], [(95, 60, 140, 110)])
    printed, wanted = json.loads(result.stdout), expected.to_roboflow(rle=True)
    for prediction in [*printed["predictions"], *wanted["predictions"]]:
        del prediction["detection_id"]  # a new one each time
    assert printed == wanted


def test_segment_prints_a_table(url: str, photo: Path) -> None:
    result = invoke("segment", photo, *POINT, *BOX, "--threshold", "-1", url=url)
    assert result.exit_code == 0, result.output
    assert "2 masks" in result.stdout
    assert result.stdout.count("foreground") == 2


def test_segment_chooses_the_format_by_the_suffix(url: str, photo: Path, tmp_path: Path) -> None:
    outputs = {suffix: tmp_path / f"out.{suffix}" for suffix in ("png", "jpg", "json", "npz")}
    for output in outputs.values():
        assert invoke("segment", photo, *POINT, "--output", output, url=url).exit_code == 0
    with Client(url) as client:
        expected = client.segment(photo, [(110, 80)])
    np.testing.assert_array_equal(Segmentation.load(outputs["npz"]).masks, expected.masks)
    assert len(json.loads(outputs["json"].read_text())["predictions"]) == len(expected)
    overlay = np.asarray(Image.open(outputs["png"]))
    assert overlay.shape == (303, 384, 3)
    assert (overlay != np.asarray(Image.open(photo))).any()
    numbers = tmp_path / "numbers.png"
    invoke("segment", photo, *POINT, "--output", numbers, "--index-mask", url=url)
    np.testing.assert_array_equal(np.asarray(Image.open(numbers)) == 1, expected.masks[0])


def test_the_url_may_come_from_the_environment(
    url: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_SAM3_URL", url)
    assert invoke("segment", photo, *POINT).exit_code == 0


def test_shared_memory_is_an_option(url: str, photo: Path) -> None:
    result = invoke("segment", photo, *POINT, "--shared-memory", "system", url=url)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--header", "a:b", "--header", "authorization=Bearer secret"],
            "--header number 2 is not",
        ),
        (["--header", "authorization Bearer sec:ret"], "the name of header 1 is not valid"),
        (["--header", "x-key: secrét"], "the value of header 'x-key' must be"),
        (["--token", "secret\n"], "the value of header 'authorization' must be"),
        (["--url", "http://host?token=secret"], "must not contain a query"),
        (["--url", "http://me:secret@host"], "must not contain a user name or a password"),
        (["--metrics-url", "http://host?token=secret", "--url", "URL"], "must not contain a query"),
    ],
)
def test_no_secret_is_printed(server: TritonServer, options: list[str], sentence: str) -> None:
    given = [server.grpc_url if option == "URL" else option for option in options]
    result = invoke("status", *given)
    assert result.exit_code == BAD_INPUT, result.output
    assert sentence in result.output
    assert "sec" not in result.output


def test_the_token_and_headers_are_sent_together() -> None:
    with misbehaving.http((404, b"{}")) as (url, counter):
        invoke("status", "--token", "mine", "--header", "x-key: other", url=url)
        sent = counter.headers[0]
        assert (sent["authorization"], sent["x-key"]) == ("Bearer mine", "other")


@pytest.mark.parametrize("name", ["authorization", "Authorization"])
def test_a_header_of_the_tokens_name_takes_its_place(name: str) -> None:
    with misbehaving.http((404, b"{}")) as (url, counter):
        invoke("status", "--token", "mine", "--header", f"{name}: Basic other", url=url)
        assert counter.headers[0]["authorization"] == "Basic other"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["segment", "PHOTO"], "there is nothing to segment"),
        (["segment", "PHOTO", "--point", "1"], "--point '1' is not X,Y or X,Y,0"),
        (["segment", "PHOTO", "--point", "a,b"], "--point 'a,b' is not X,Y or X,Y,0"),
        (["segment", "PHOTO", "--box", "1,2,3"], "--box '1,2,3' is not X0,Y0,X1,Y1"),
        (["segment", "PHOTO", "--box", "5,5,1,1"], "x_min must be at most x_max"),
        (["segment", "PHOTO", "--point", "900,5"], "is outside the image"),
        (["segment", "nowhere.png", *POINT], "there is no file 'nowhere.png'"),
        (["segment", "PHOTO", *POINT, "--output", "out.gif"], "cannot save to 'out.gif'"),
        (["segment", "PHOTO", *POINT, "-o", "x.jpg", "--index-mask"], "needs --output FILE.png"),
        (["segment", "PHOTO", *POINT, "-o", "x.npz", "--index-mask"], "needs --output FILE.png"),
        (["segment", "PHOTO", *POINT, "--index-mask"], "needs --output FILE.png"),
        (["segment", "PHOTO", *POINT, "-o", "PHOTO"], "the result would replace the image"),
        (
            ["segment", "PHOTO", *POINT, "-o", "no/x.png"],
            "there is no folder 'no' to write 'x.png'",
        ),
        (
            ["segment", "PHOTO", *POINT, "--timeout", "inf"],
            "timeout must be a number of seconds above 0",
        ),
        (
            ["segment-dir", "FOLDER", "-o", "FOLDER", *POINT],
            "cannot go into the folder of the images",
        ),
        (["segment-dir", "FOLDER", "-o", "PHOTO", *POINT], "the results need a folder"),
        (["segment", "PHOTO", *POINT, "--threshold", "nan"], "threshold must be a number"),
        (["segment-dir", "nowhere", "--output", "OUT", *POINT], "there is no folder 'nowhere'"),
        (["segment-dir", "FOLDER", "--output", "OUT"], "there is nothing to segment"),
        (["segment-dir", "EMPTY", "--output", "OUT", *POINT], "there are no images in"),
    ],
)
def test_bad_input_prints_one_sentence_and_exits_with_2(
    server: TritonServer, photo: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "PHOTO": photo,
        "FOLDER": photo.parent,
        "EMPTY": tmp_path / "empty",
        "OUT": tmp_path / "out",
    }
    result = invoke(*(places.get(each, each) for each in arguments), url=server.grpc_url)
    assert result.exit_code == BAD_INPUT
    assert result.stderr.startswith("triton-sam3: ")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_invalid_url_is_bad_input(photo: Path) -> None:
    result = invoke("segment", photo, *POINT, url="localhost:8001")
    assert result.exit_code == BAD_INPUT
    assert "is not a server URL" in result.stderr


def test_an_unreachable_server_exits_with_1(photo: Path) -> None:
    url = f"grpc://127.0.0.1:{misbehaving.unused_port()}"
    result = invoke("segment", photo, *POINT, "--timeout", "0.5", url=url)
    assert result.exit_code == FAILED
    assert url in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_broken_file_in_a_folder_does_not_stop_the_others(
    url: str, photo: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    result = invoke("segment-dir", folder, "--output", output, *POINT, url=url)
    assert result.exit_code == SOME_FAILED
    assert "2 of 3 images segmented" in result.stdout
    assert "broken.jpg" in result.stderr
    assert sorted(path.name for path in output.iterdir()) == ["a.png.json", "b.png.json"]
    assert json.loads((output / "a.png.json").read_text())["image"]["width"] == 384


def test_images_of_the_same_name_are_written_to_their_own_folders(
    url: str, photo: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.png").write_bytes(photo.read_bytes())
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({f"{name}/x.png": {"points": [[110, 80]]} for name in "ab"}))
    arguments = ["segment-dir", folder, "-o", output, "--prompts", prompts]
    assert invoke(*arguments, url=url).exit_code == 0
    written = sorted(str(path.relative_to(output)) for path in output.glob("*/*"))
    assert written == ["a/x.png.json", "b/x.png.json"]


def test_a_folder_without_a_server_prints_one_sentence_and_exits_with_1(
    photo: Path, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(photo.read_bytes())
    url = f"grpc://127.0.0.1:{misbehaving.unused_port()}"
    arguments = ["segment-dir", tmp_path, "-o", tmp_path / "out", *POINT, "--timeout", "0.5"]
    result = invoke(*arguments, url=url)
    assert result.exit_code == FAILED
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    missing = b'{"error": "Request for unknown model: \'x\' is not found"}'
    with misbehaving.http((200, misbehaving.METADATA), (404, missing)) as (empty, _):
        result = invoke(*arguments, url=empty)
    assert result.exit_code == FAILED
    assert "does not serve sam3_interactive, " in result.stderr


def test_a_folder_can_have_prompts_for_each_image(url: str, photo: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({photo.name: {"boxes": [[95, 60, 140, 110]]}}))
    arguments = ["segment-dir", photo.parent, "--output", tmp_path / "out", "--prompts", prompts]
    result = invoke(*arguments, "--format", "npz", "--threshold", "-1", "--json", url=url)
    assert result.exit_code == 0, result.output
    (line,) = json.loads(result.stdout)
    assert (Path(line["image"]).name, line["masks"]) == (photo.name, 1)
    assert len(Segmentation.load(line["output"])) == 1
    both = invoke(*arguments, *POINT, url=url)
    assert both.exit_code == BAD_INPUT
    prompts.write_text("[]")
    assert "must hold" in invoke(*arguments, url=url).stderr


def test_status(url: str, server: TritonServer) -> None:
    result = invoke("status", "--metrics-url", server.metrics_url, url=url)
    assert result.exit_code == 0, result.output
    assert "sam3_prompt_decoder" in result.stdout
    printed = json.loads(invoke("status", "--json", url=url).stdout)
    assert printed["ready"] is True
    assert [model["ready"] for model in printed["models"]] == [True] * 3


def test_the_installed_command(server: TritonServer) -> None:
    command = Path(sys.executable).with_name("triton-sam3")
    done = subprocess.run(
        [command, "status", "--json", "--url", server.http_url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == server.http_url
    helped = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "Exit codes" in helped.stdout
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"triton-sam3 {version('triton-sam3')}\n"


def test_help_names_every_scheme() -> None:
    helped = invoke("segment", "--help").output
    assert all(scheme in helped for scheme in ("grpc://", "grpcs://", "http://", "https://"))


def test_the_token_is_sent_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_SAM3_TOKEN", "secret")
    with misbehaving.http((404, b"{}")) as (url, server):
        invoke("status", url=url)
        invoke("status", "--token", "other", url=url)
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.headers[-1]["authorization"] == "Bearer other"


def test_help_names_every_exit_code() -> None:
    printed = invoke("--help").stdout
    for code in (0, FAILED, BAD_INPUT, SOME_FAILED):
        assert f" {code}  " in printed


@pytest.mark.parametrize("command", ["segment", "segment-dir", "status"])
def test_every_option_reaches_the_client(
    command: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}

    class RecordingClient:
        def __init__(self, url: str, **options: Any) -> None:
            received.update(options, url=url)

        def __enter__(self) -> "RecordingClient":
            return self

        def __exit__(self, *_: object) -> None: ...

        def status(self) -> ServerStatus:
            return ServerStatus("", "triton", "1", (), None)

        def segment(self, *_: object, **arguments: Any) -> None:
            received.update(arguments)
            raise ServerError("that was all")

        segment_many = segment

    monkeypatch.setattr(cli, "Client", RecordingClient)
    options: dict[str, Any] = {"timeout": 7.0, "root_certificates": photo}
    more: list[Any] = []
    if command != "status":
        options |= {"threshold": 0.25, "shared_memory": "system"}
        more = [photo, *POINT, "--single-mask"]
    if command == "segment-dir":
        options["concurrency"] = 3
        more[0] = photo.parent
        more += ["--output", tmp_path / "out"]
    named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    headers = ["--header", "authorization: Bearer a:b", "--header", "x-y:z"]
    result = invoke(command, *more, *named, *headers, url="grpcs://host")
    assert "that was all" in result.stderr or command == "status", result.output
    options["headers"] = {"authorization": "Bearer a:b", "x-y": "z"}
    options["url"] = "grpcs://host"
    if command != "status":
        options["multimask_output"] = False
    assert {name: received.get(name) for name in options} == options


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_server_that_is_not_ready_exits_with_1(more: list[str]) -> None:
    missing = b'{"error": "Request for unknown model: \'x\' is not found"}'
    with misbehaving.http((200, misbehaving.METADATA), (404, missing)) as (url, _):
        result = invoke("status", *more, url=url)
    assert result.exit_code == FAILED
    assert "sam3_prompt_decoder" in result.stdout
    assert not result.stderr


def test_text_in_tables_is_not_taken_for_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as an IPv6 address, or a class name in brackets."""
    url = "grpc://[fd00::1]:8001"
    found = ServerStatus(url, "triton[/b]", "2", (ModelStatus("sam3", ("[1]",), True),), None)
    monkeypatch.setenv("COLUMNS", "100")
    cli._print_status(found, {"sam3_kept_images": 3.0})
    printed = capsys.readouterr().out
    for text in (url, "triton[/b]", "[1]", "sam3_kept_images 3"):
        assert text in printed
