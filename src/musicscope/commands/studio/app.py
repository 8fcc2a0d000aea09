"""Serve an interactive page on this machine: switch concepts off and on, and listen.

    musicscope studio                     # then open the address that it prints

Needs Gradio (pip install -e '.[studio]'). The page is served to this machine only and makes no
requests to others.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from typing import TYPE_CHECKING

from musicscope.commands.generate import usual_guidance
from musicscope.commands.studio import logic

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
MAX_UPLOAD = "100mb"
"""Largest uploaded file."""


def prepare(uploads: str) -> None:
    """Set the environment that Gradio reads on import, so that nothing leaves this machine.

    ValueError: Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "the page needs Gradio: pip install -c requirements.lock -e '.[studio]' (in .venv); "
            "without a checkout: pip install 'musicscope[studio]'"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = uploads
    # Gradio sends requests to itself when it starts; they must not go to a proxy.
    for name in ("no_proxy", "NO_PROXY"):
        known = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*known, HOST, "localhost"]))


def serve(device: str, port: int | None, wait: bool, browser: bool = False) -> tuple[Blocks, str]:
    """Start the page and return it with its address; call `prepare` first.

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
    # Refuse pages of other hosts whose name resolves to this machine.
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
    if args.workspace:
        os.chdir(args.workspace)
    with tempfile.TemporaryDirectory(prefix="musicscope-studio-") as uploads:
        prepare(uploads)
        serve(args.device, args.port, wait=True, browser=args.open)
