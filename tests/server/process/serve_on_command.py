"""`kvpaging serve` with the engine of `engine_on_command.py`; arguments are the command's flags."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvpaging.base.errors import ConfigError
from server.launch import serve
from server.settings import FlagParser, add_flags, resolve

if __name__ == "__main__":
    parser = FlagParser("serve_on_command", "")
    add_flags(parser)
    settings = resolve(vars(parser.parse(sys.argv[1:])), os.environ).settings
    engine = Path(__file__).with_name("engine_on_command.py")
    try:
        sys.exit(serve(settings, (sys.executable, str(engine))))
    except ConfigError as error:
        sys.exit(f"refused: {error}")
