"""`musicscope view`: only the pages, only to this machine, with byte ranges."""

from __future__ import annotations

import http.client
import threading

import pytest

from musicscope.commands import view


@pytest.fixture
def ask(tmp_path):
    files = {
        "data/report/report.html": "report", "data/secret.txt": "secret", ".env": "secret",
        "data/feature_pages/clips/0.mp3": "0123456789",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "data/report/link").symlink_to(tmp_path / "data/secret.txt")
    with view.server(tmp_path) as pages:
        thread = threading.Thread(target=pages.serve_forever, daemon=True)
        thread.start()

        def ask(path: str, **headers: str):
            connection = http.client.HTTPConnection(view.HOST, pages.server_address[1], timeout=10)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

        yield ask
        pages.shutdown()
        thread.join()


def test_the_report_and_the_pages_are_served(ask):
    status, _, headers = ask("/")
    assert (status, headers["Location"]) == (302, "/data/report/report.html")
    assert ask("/data/report/report.html")[:2] == (200, "report")


def test_ranges_of_sound_are_served(ask):
    path = "/data/feature_pages/clips/0.mp3"
    status, text, headers = ask(path, Range="bytes=2-4")
    assert (status, text, headers["Content-Range"]) == (206, "234", "bytes 2-4/10")
    assert ask(path, Range="bytes=7-")[:2] == (206, "789")
    assert ask(path, Range="bytes=7-99")[:2] == (206, "789")
    assert ask(path, Range="bytes=10-")[0] == 416
    assert ask(path)[:2] == (200, "0123456789")
    assert ask(path)[2]["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    "path",
    ["/data/secret.txt", "/.env", "/data/report/../secret.txt", "/data/report/%2e%2e/secret.txt",
     "/data/report/link", "/data/report/", "/data", "/data/report/none"],
)  # fmt: skip
def test_nothing_else_is_served(ask, path):
    status, text, _ = ask(path)
    assert status == 404
    assert "secret" not in text.replace("secret.txt", "")


def test_a_page_of_another_host_is_refused(ask):
    assert ask("/data/report/report.html", Host="evil.example")[0] == 404
    assert ask("/data/report/report.html", Host="localhost:8000")[0] == 200


def test_missing_pages_and_a_taken_port_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro report feature_pages"):
        view.server(tmp_path)
    (tmp_path / "data/report").mkdir(parents=True)
    (tmp_path / "data/report/report.html").write_text("")
    with view.server(tmp_path) as first, pytest.raises(ValueError, match="is taken: give another"):
        view.server(tmp_path, first.server_address[1])
