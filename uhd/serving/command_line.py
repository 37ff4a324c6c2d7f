"""The command ``uhd serve``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from uhd import commands


def add(known: Any) -> None:
    """Add it to the parser's commands."""
    command = known.add_parser("serve", help="a saved model over HTTP, as OpenAI's clients speak")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="that model.save_pretrained wrote")
    which.add_argument("--nano", nargs="?", const="nano", metavar="NAME", help="a shipped model (default nano)")
    command.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine only)")
    command.add_argument("--port", type=int, default=8000, help="default 8000")
    command.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port is a number from 0 to 65535, got {args.port}")
    from uhd.pixels import DEFAULT

    if args.max_pixels is not None:
        DEFAULT.replace(max_pixels=args.max_pixels)  # refused here, not picture by picture
    from transformers.utils import logging
    from transformers.utils.import_utils import is_serve_available

    logging.disable_progress_bar()
    try:
        if not is_serve_available():
            raise ImportError("one of fastapi, uvicorn, openai and pydantic is missing")
        from uhd.serving.server import ready
    except ImportError as problem:
        raise ValueError(
            f"the server of transformers is needed ({problem}): pip install 'llava-uhd[serving]'"
        ) from None

    server = ready(
        args.folder if args.nano is None else args.nano, host=args.host, port=args.port, max_pixels=args.max_pixels
    )
    try:
        server.server.run()
    except SystemExit:  # it has said why it cannot listen
        return commands.REFUSED
    return commands.DONE
