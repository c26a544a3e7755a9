"""A local page on a checkpoint: sample, compare, interpolate, reconstruct, and watch the noise become images.

    python explore_ddpm.py --weights RUN [--port 7860]

Opens http://127.0.0.1:7860 to this machine alone, unless --host says otherwise. Whatever it shows, it also shows the
command line of sample_ddpm.py that makes the same pictures. Needs gradio: pip install -r requirements-explore.txt
"""

import argparse
import atexit
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

import sample_ddpm
from utils import cli, config, constraints
from utils.errors import InputError, run_script

N_AT_ONCE = 4  # requests that compute; more wait for their turn, with the page free


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("-c", "--config", metavar="CONFIG", help="YAML file, where the weights have no stored one")
    add("--weights", metavar="PATH", help="run, checkpoint or diffusers folder, weights file, hub id")
    add("--load_ema", type=cli.boolean, metavar="BOOL", help="EMA (true, the default) or raw weights")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="who may connect (default: 127.0.0.1, this machine)")
    add("--port", type=port, default=7860, metavar="PORT", help="of the page (default: 7860)")
    add("--save_dir", default="explored", metavar="DIR", help="where uploaded images are kept (default: explored)")
    options, overrides = parser.parse(argv)
    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    asked.append(("command line", overrides))
    config.merge(*asked)
    if options.print_config and options.weights is None:
        cli.show(config.to_yaml(config.merge(*asked)))
        return 0
    cli.require(options, "weights")
    if not options.print_config:
        check_place(options)

    from utils.weights import open_weights

    weights = open_weights(options.weights, options.load_ema, asked)
    constraints.drop_stored_eta(weights.config, {name for _, layer in asked for name in layer})
    constraints.check(weights.config, training=False)
    if options.print_config:
        cli.show(config.to_yaml(weights.config))
        return 0
    return serve(options, weights, overrides)


def port(text: str) -> int:
    """argparse type of a port."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)


def check_place(options: argparse.Namespace) -> None:
    """Raise InputError where the page can't be shown: gradio is missing, the address is not ours or in use."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio, which is not installed: pip install -r requirements-explore.txt")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((options.host, options.port))
    except OSError as error:
        raise InputError(f"--host {options.host} --port {options.port} can't be used: {error.strerror}") from None


def serve(options: argparse.Namespace, weights, overrides: dict[str, str]) -> int:
    """Show the page until Ctrl-C or SIGTERM."""
    place = Path(tempfile.mkdtemp(prefix="explore-ddpm-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Nothing is sent anywhere, and uploads and downloads vanish with the process; read when gradio is imported.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(place))

    from utils import distributed
    from utils.explorer.drawing import Explorer
    from utils.explorer.request import fixed_arguments
    from utils.explorer.watching import Works

    fixed = fixed_arguments(options.weights, weights, options.config, overrides)
    explorer = Explorer(weights, distributed.start(), fixed, sample_ddpm)

    from utils.explorer import html, layout, upload
    from utils.explorer.page import Page

    works = Works(N_AT_ONCE, place)
    blocks = layout.build(Page(explorer, works, Path(options.save_dir)))
    try:
        blocks.launch(
            server_name=options.host, server_port=options.port, share=False, quiet=True, prevent_thread_lock=True,
            theme=layout.theme(), css=html.CSS, footer_links=[],
            max_file_size=upload.MOST_BYTES, enable_monitoring=False, ssr_mode=False,
            pwa=False, mcp_server=False, run_history=False, head=html.HEAD,
        )  # fmt: skip
        cli.say(f"{weights.describe()}: http://{options.host}:{options.port} (Ctrl-C ends)")
        threading.Event().wait()
    finally:
        works.close()
        blocks.close(verbose=False)
    return 0


if __name__ == "__main__":
    run_script(main)
