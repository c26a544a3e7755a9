"""How the scripts end when the user's input is wrong: one clear line, exit status 2, no traceback."""

import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what is wrong and what would be right."""


def is_main_process() -> bool:
    """True on the process that may speak, known from the launcher's environment before torch is imported."""
    return int(os.environ.get("RANK", "0")) == 0


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` and exit: its status, 2 for wrong input, 130 for Ctrl-C. Anything else keeps its traceback."""
    try:
        status = main(sys.argv[1:])
    except InputError as error:
        if is_main_process():
            print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        if is_main_process():
            print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
