"""The page of a run: one HTML file that needs no server, no network and no other file.

    python -m utils.report RUN [--out FILE]

Writes RUN/report.html: configuration, curves, previews, scores, system, checkpoints with what verifying them found, and
commands to go on with. Nothing else is changed; a training that is under way can be looked at.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from utils.errors import InputError, run_script

TEMPLATES = Path(__file__).resolve().parent / "templates"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (usage: python -m utils.report RUN [--out FILE])")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m utils.report", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: RUN/report.html)")
    options = parser.parse_args(argv)
    folder = Path(options.run)
    out = Path(options.out) if options.out else folder / "report.html"
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: wanted a file, such as {out / 'report.html'}")
    if options.out and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    write_page(folder, out)
    print(f"page of the run: {out.resolve()}")
    return 0


def write_page(folder: Path, out: Path) -> None:
    """Raises InputError: no run folder, a configuration that can't be read, or a place that can't be written."""
    from utils.checkpoint import write_atomically
    from utils.run_summary import read_run

    text = page(read_run(folder))
    try:
        write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{out} can't be written: {error.strerror}") from None


def page(run) -> str:
    """HTML of a utils.run_summary.RunSummary. Every text is escaped; only its SVG is taken as it is."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("run_page.html").render(run=run, now=f"{datetime.now():%Y-%m-%d %H:%M}")


if __name__ == "__main__":
    run_script(main)
