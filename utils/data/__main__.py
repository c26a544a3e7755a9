"""Look at a data set before training on it.

    python -m utils.data check [-c CONFIG] [--data.name NAME --data.root PATH ...] [--sheet FILE]

Reads every image as training would; prints counts, classes, stored sizes, broken files by name and images per second;
writes a contact sheet. Exit status 1 where an image is broken.
"""

from pathlib import Path

from utils import cli, config, constraints
from utils.errors import InputError, run_script


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m utils.data", description=__doc__)
    parser.add_argument("command", nargs="?", metavar="check", help="the one thing to do")
    parser.add_argument("-c", "--config", metavar="CONFIG", help="YAML file (default: the digits)")
    parser.add_argument("--sheet", metavar="FILE", default="contact.png", help="the contact sheet (contact.png)")
    options, overrides = parser.parse(argv)
    if options.command != "check":
        raise InputError("usage: python -m utils.data check [-c CONFIG] [--data.KEY VALUE ...] (--help explains)")
    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    new = config.merge(*asked, ("command line", overrides))
    constraints.check_data(new.data)
    if options.print_config:
        cli.show(config.to_yaml(new))
        return 0
    from utils.data.check import check

    return check(new.data, Path(options.sheet))


if __name__ == "__main__":
    run_script(main)
