"""`triton-sam3`: segment from the command line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from . import folders
from .client import Client
from .endpoint import DEFAULT_URL
from .errors import ImageError, InvalidRequest, ModelUnavailable, PromptError, SAM3Error
from .prompts import to_prompts
from .regions import Kind
from .results import Segmentation
from .retry import DEFAULT_TIMEOUT
from .saving import file_kind
from .status import ServerStatus, store_metrics

FAILED, BAD_INPUT, SOME_FAILED = 1, 2, 3

HELP = """Segment images with a SAM 3 server.

Exit codes:

0  success

1  the server failed, is unreachable, or is not ready

2  invalid input

3  some images in a folder could not be segmented; the others were
"""

app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


class Format(str, Enum):
    """What segment-dir writes for each image."""

    json = "json"
    npz = "npz"
    png = "png"


SharedMemoryKind = Enum("SharedMemoryKind", {kind: kind for kind in get_args(Kind)}, type=str)  # type: ignore[misc]


URLS = "grpc:// or http://; with TLS, grpcs:// or https://"

# Optional[…] rather than … | None: typer evaluates these at run time, and Python 3.10 is supported.
Url = Annotated[str, typer.Option(envvar="TRITON_SAM3_URL", help=URLS)]
Token = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(envvar="TRITON_SAM3_TOKEN", help="Bearer token for a proxy that requires one."),
]
Headers = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--header", metavar="NAME:VALUE", help="Sent with every request; repeatable."),
]
Timeout = Annotated[float, typer.Option(help="Seconds an image may take, including retries.")]
Certificates = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="PEM file of the certificate authorities to trust, for TLS.", exists=True),
]
Shared = Annotated[
    Optional[SharedMemoryKind],  # noqa: UP045
    typer.Option(
        "--shared-memory",
        help="Pass images through shared memory; the server must run on this host.",
    ),
]
Points = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--point", metavar="X,Y[,0]", help="Pixels; ,0 marks background. Repeatable."),
]
Boxes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Pixels; each is one object. Repeatable."),
]
Threshold = Annotated[float, typer.Option(help="Drop masks with a lower predicted IoU.")]
Multimask = Annotated[
    bool,
    typer.Option(
        "--multimask/--single-mask", help="Propose three masks per object and keep the best."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"triton-sam3 {version('triton-sam3')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Global options."""


@app.command()
def segment(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    point: Points = None,
    box: Boxes = None,
    threshold: Threshold = 0.0,
    multimask: Multimask = True,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help=".png or .jpg overlay, .json, or .npz", dir_okay=False),
    ] = None,
    index_mask: Annotated[
        bool,
        typer.Option("--index-mask", help="Write a .png of mask indices instead of an overlay."),
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    header: Headers = None,
    timeout: Timeout = DEFAULT_TIMEOUT,
    root_certificates: Certificates = None,
    shared_memory: Shared = None,
) -> None:
    """Segment one image: all points mark one object, each box another."""
    with _report_errors():
        asked = _points_and_boxes(point, box)
        if index_mask and (output is None or output.suffix.lower() != ".png"):
            raise ValueError("--index-mask needs --output FILE.png")
        if output is not None:
            _check_file(output, Path(image))
        with _connect(url, token, header, timeout, root_certificates, shared_memory) as client:
            result = client.segment(image, **asked, threshold=threshold, multimask_output=multimask)
        if output is not None:
            result.save(output, None if index_mask else image, prompts=to_prompts(**asked))
    if as_json:
        typer.echo(json.dumps(result.to_roboflow(rle=True)))
    else:
        Console().print(_mask_table(result))


@app.command()
def segment_dir(
    folder: Annotated[Path, typer.Argument(help="Folder of images (not recursive).")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write to, one file per image.")
    ],
    point: Points = None,
    box: Boxes = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help='JSON: {"image.jpg": {"points": […], "boxes": […]}, …}, instead of the same '
            "points and boxes for every image.",
            exists=True,
        ),
    ] = None,
    threshold: Threshold = 0.0,
    multimask: Multimask = True,
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.json,
    concurrency: Annotated[int, typer.Option(min=1, help="Images processed concurrently.")] = 8,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    header: Headers = None,
    timeout: Timeout = DEFAULT_TIMEOUT,
    root_certificates: Certificates = None,
    shared_memory: Shared = None,
) -> None:
    """Segment every image in a folder; one that fails does not stop the others."""
    with _report_errors():
        images, asked = _folder_work(folder, prompts, point, box)
        folders.check_output(folder, output)
        with _connect(url, token, header, timeout, root_certificates, shared_memory) as client:
            _check_ready(client.status())
            output.mkdir(parents=True, exist_ok=True)
            outcomes = client.segment_many(
                images,
                asked,
                threshold=threshold,
                multimask_output=multimask,
                concurrency=concurrency,
            )
            bar = track(
                outcomes, "segmenting", len(images), console=Console(stderr=True), disable=as_json
            )
            lines = [folders.write(outcome, folder, output, format.value) for outcome in bar]
    failed = [line for line in lines if "error" in line]
    if as_json:
        typer.echo(json.dumps(lines))
    else:
        for line in failed:
            typer.echo(f"{line['image']}: {line['error']}", err=True)
        typer.echo(f"{len(lines) - len(failed)} of {len(lines)} images segmented to {output}")
    if failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
def status(
    metrics_url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Also show the models' own metrics, from http://host:8002/metrics"),
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    header: Headers = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds the server may take, including retries.")
    ] = 10.0,
    root_certificates: Certificates = None,
) -> None:
    """Show the server, its models and, with --metrics-url, their own metrics."""
    with _report_errors():
        with _connect(url, token, header, timeout, root_certificates, None) as client:
            found = client.status()
        metrics = store_metrics(metrics_url, timeout) if metrics_url else {}
    if as_json:
        typer.echo(json.dumps({**asdict(found), "ready": found.ready, "metrics": metrics}))
    else:
        _print_status(found, metrics)
    if not found.ready:
        raise typer.Exit(FAILED)


def main() -> None:
    """The command's entry point."""
    app()


@contextmanager
def _report_errors() -> Iterator[None]:
    """Turn errors into one sentence on stderr and an exit code."""
    try:
        yield
    except (PromptError, ImageError, InvalidRequest) as error:
        _fail(error, BAD_INPUT)
    except SAM3Error as error:
        _fail(error, FAILED)
    except (ValueError, OSError) as error:
        _fail(error, BAD_INPUT)


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"triton-sam3: {error}", err=True)
    raise typer.Exit(code) from error


def _connect(
    url: str,
    token: str | None,
    header: list[str] | None,
    timeout: float,
    root_certificates: Path | None,
    shared_memory: SharedMemoryKind | None,
) -> Client:
    headers = dict(_header(line, index) for index, line in enumerate(header or (), 1))
    if token is not None:
        headers.setdefault("authorization", f"Bearer {token}")
    return Client(
        url,
        headers=headers,
        timeout=timeout,
        root_certificates=root_certificates,
        shared_memory=shared_memory.value if shared_memory else None,
    )


def _header(line: str, index: int) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not name.strip():
        raise ValueError(
            f"--header number {index} is not NAME:VALUE (not shown, as it may be confidential)"
        )
    return name.strip().lower(), value.strip()  # so that a token is not set beside Authorization


def _points_and_boxes(point: list[str] | None, box: list[str] | None) -> dict[str, Any]:
    """Parse --point and --box into keyword arguments of `Client.segment`."""
    points = [_numbers(text, (2, 3), "--point", "X,Y or X,Y,0") for text in point or ()]
    boxes = [_numbers(text, (4,), "--box", "X0,Y0,X1,Y1") for text in box or ()]
    return {"points": points or None, "boxes": boxes or None}


def _numbers(text: str, counts: tuple[int, ...], option: str, form: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts:
        raise PromptError(f"{option} {text!r} is not {form}")
    return values


def _check_file(output: Path, image: Path) -> None:
    """Reject an output file that cannot be written, or is the image itself, before the server does
    any work."""
    file_kind(output, with_image=True)
    if not output.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {str(output.parent)!r} to write {output.name!r} to")
    if output.exists() and image.exists() and output.samefile(image):
        raise ValueError(f"the result would replace the image {str(image)!r}: choose another file")


def _folder_work(
    folder: Path, prompts: Path | None, point: list[str] | None, box: list[str] | None
) -> tuple[list[Path], Any]:
    """The images of a folder and their prompts, as `Client.segment_many` takes them."""
    if prompts is None:
        images, asked = folders.images_in(folder), _points_and_boxes(point, box)
        to_prompts(**asked)  # an error applies to every image: report it once
        return images, asked
    if point or box:
        raise PromptError("give either --prompts, or --point and --box")
    by_image = folders.read_prompts(folder, prompts)
    return list(by_image), list(by_image.values())


def _check_ready(found: ServerStatus) -> None:
    """Fail once, before the first image, rather than for each image."""
    missing = [model.name for model in found.models if not model.ready]
    if missing:
        raise ModelUnavailable(
            f"{found.url} does not serve {', '.join(missing)}, or is still loading"
        )


def _mask_table(result: Segmentation) -> Table:
    table = Table("class", "score", "box (x0, y0, x1, y1)", "pixels", title=f"{len(result)} masks")
    for mask in result:
        box = ", ".join(f"{side:g}" for side in mask.box)
        table.add_row(escape(mask.class_name), f"{mask.score:.3f}", box, str(mask.area))
    return table


def _print_status(found: ServerStatus, metrics: dict[str, float]) -> None:
    title = escape(f"{found.server} {found.version} {found.url}")
    table = Table("model", "versions", "ready", title=title)
    for model in found.models:
        versions = escape(", ".join(model.versions))
        table.add_row(model.name, versions, "yes" if model.ready else "NO")
    console = Console()
    console.print(table)
    if found.served is not None:
        side, masks = found.served.image_side, found.served.mask_side
        console.print(f"images {side}×{side}, mask logits {masks}×{masks}")
    for name, value in metrics.items():
        console.print(f"{name} {value:g}")


if __name__ == "__main__":
    main()
