"""How the scripts end when the user's input is wrong: one clear line, exit status 2, no traceback."""

import errno
import os
import sys
from collections.abc import Callable

LONGEST = 1000  # characters of an error line


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what is wrong and what would be right."""


class RankError(InputError):
    """Wrong input that perhaps one process alone has met, which therefore says so itself."""


class TrainingDiverged(Exception):
    """Too many updates in a row had a non-finite gradient; the message names the last good checkpoint."""


class SaveFailed(Exception):
    """A file of a run could not be written; the checkpoints are untouched."""


def is_main_process() -> bool:
    """True on the process that may speak, known from the launcher's environment before torch is imported."""
    return int(os.environ.get("RANK", "0")) == 0


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` and exit with its status: 2 wrong input, 1 a diverged or unsaved training, 130 Ctrl-C.

    Each of these is one line on stderr, from the main process only. Anything else keeps its traceback.
    """
    speaks = is_main_process()
    try:
        status, line = main(sys.argv[1:]), None
    except RankError as error:
        status, line, speaks = 2, f"error: {error}", True
    except InputError as error:
        status, line = 2, f"error: {error}"
    except (TrainingDiverged, SaveFailed) as error:
        status, line = 1, f"stopped: {error}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        status, line = 2, f"error: {error.filename}: {error.strerror}"
    if line and speaks:
        print(f"{os.path.basename(sys.argv[0])}: {one_line(line)}", file=sys.stderr)
    sys.exit(status)


def one_line(text: str) -> str:
    """Without line breaks and control characters, and of bounded length: what users wrote is quoted in errors."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
