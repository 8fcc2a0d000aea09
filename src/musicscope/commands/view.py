"""Serve the report and the feature pages on this machine alone.

    musicscope view --open

Both also open as files: data/report/report.html and data/feature_pages/index.html. Serves these
folders and docs/, to read, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import webbrowser
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

HOST = "127.0.0.1"
FIRST, LAST = 8000, 8099
"""Ports that are tried without --port."""
SERVED = ("data/report", "data/feature_pages", "docs")
STARTS = ("data/report/report.html", "data/feature_pages/index.html")


class Handler(SimpleHTTPRequestHandler):
    """Files below `SERVED`, with byte ranges, without which a browser cannot seek in sound."""

    end: int | None = None
    """Bytes that are left to send of a range."""

    def allowed(self) -> bool:
        """Whether the file asked for lies in a served folder and the page was asked for by name.

        Pages of other hosts whose name resolves to this machine are refused.
        """
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        path = Path(self.translate_path(self.path)).resolve()
        roots = [(Path(self.directory) / name).resolve() for name in SERVED]
        return host in (HOST, "localhost") and any(path.is_relative_to(root) for root in roots)

    def send_head(self):
        """Send the headers of a file or of a part of it; a folder is not listed."""
        self.end = None
        if self.path in ("", "/"):
            start = next(one for one in STARTS if (Path(self.directory) / one).is_file())
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", f"/{start}")
            self.end_headers()
            return None
        path = Path(self.translate_path(self.path))
        if not self.allowed() or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return super().send_head()
        size = path.stat().st_size
        first = int(asked[1])
        last = min(int(asked[2] or size - 1), size - 1)
        if first > last:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return None
        stream = path.open("rb")
        stream.seek(first)
        self.end = last - first + 1
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(self.end))
        self.end_headers()
        return stream

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:  # ty: ignore
        """Send the whole file, or the range."""
        if self.end is None:
            super().copyfile(source, outputfile)
        else:
            outputfile.write(source.read(self.end))

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: the terminal shows the address."""


def server(root: Path, port: int | None = None) -> ThreadingHTTPServer:
    """Bind a server of the pages below `root`, on `port` or the first free one from 8000.

    Raises:
        FileNotFoundError: there is no page; the message names the stages to run.
        ValueError: the port is taken.
    """
    if not any((root / start).is_file() for start in STARTS):
        raise FileNotFoundError(
            f"{root / STARTS[0]} and {root / STARTS[1]} are missing: run dvc repro report "
            "feature_pages, or dvc pull"
        )
    handler = partial(Handler, directory=str(root))
    for number in [port] if port else range(FIRST, LAST + 1):
        try:
            return ThreadingHTTPServer((HOST, number), handler)
        except OSError:
            continue
    taken = port or f"{FIRST} to {LAST}"
    raise ValueError(f"port {taken} is taken: give another --port")


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    root = Path(args.workspace or ".").resolve()
    with server(root, args.port) as pages:
        address = f"http://{HOST}:{pages.server_address[1]}/"
        print(f"{address}  (end with Ctrl-C)", flush=True)
        if args.open:
            webbrowser.open(address)
        pages.serve_forever()
