"""An interactive page on this machine: switch concepts off and on, and hear what it does.

    musicscope studio                     # then open the address that it prints

Needs Gradio (pip install -e '.[studio]'). The page is served to this machine alone and asks no
other for anything.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from typing import Any

from musicscope.commands.generate import usual_guidance
from musicscope.commands.studio import logic as logic

HOST = "127.0.0.1"
MAX_UPLOAD = "100mb"
"""Of one file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``musicscope studio``."""
    add = parser.add_argument
    add("--port", type=int, help="of the page; the first free one from 7860")
    add("--device", default="cpu", help="cpu or cuda")
    add("--open", action="store_true", help="open it in the browser")


def prepare(uploads: str) -> None:
    """Settings that Gradio reads when it is imported: nothing leaves this machine.

    ValueError if it is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "the page needs Gradio: pip install -c requirements.lock -e '.[studio]' (in .venv)"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = uploads
    # What Gradio asks itself when it starts must not go to a proxy.
    for name in ("no_proxy", "NO_PROXY"):
        known = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*known, HOST, "localhost"]))


def serve(device: str, port: int | None, wait: bool, browser: bool = False) -> tuple[Any, str]:
    """The running page and its address; `prepare` comes first.

    Raises:
        FileNotFoundError: no model has an SAE.
        ValueError: the port is taken.
    """
    models = logic.models_with_sae()
    if not models:
        raise FileNotFoundError(
            "no model under data/models has an SAE in data/sae: run dvc repro train_sae steer"
        )
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from musicscope.commands.studio import page as studio_page

    page = studio_page.build(models, device, usual_guidance())
    # A page elsewhere whose name points here must not get in.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    try:
        _, address, _ = page.queue(default_concurrency_limit=1, api_open=False).launch(
            server_name=HOST, server_port=port, share=False, inbrowser=browser, ssr_mode=False,
            mcp_server=False, pwa=False, show_error=False, prevent_thread_lock=not wait,
            max_file_size=MAX_UPLOAD, footer_links=[], enable_monitoring=False,
            app_kwargs={"middleware": [guard]}, theme=studio_page.theme(), css=studio_page.CSS,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"port {port or '7860 to 7959'}: {error}") from error
    return page, address


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted. ValueError and FileNotFoundError say what is missing."""
    with tempfile.TemporaryDirectory(prefix="musicscope-studio-") as uploads:
        prepare(uploads)
        serve(args.device, args.port, wait=True, browser=args.open)
