"""``python -m elfatt.analysis``: benchmark the models and compare them with the paper."""

from __future__ import annotations

import argparse
import subprocess
import sys

from elfatt.analysis import diffusion, edge, error, maps, op, plots, pretrained, report, runtimes, scaling, tables
from elfatt.console import replace_unprintable

COMMANDS = {
    "tables": tables,
    "scaling": scaling,
    "edge": edge,
    "runtimes": runtimes,
    "op": op,
    "error": error,
    "maps": maps,
    "diffusion": diffusion,
    "pretrained": pretrained,
    "plot": plots,
    "report": report,
}


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser, with one subcommand per module."""
    parser = argparse.ArgumentParser(prog="python -m elfatt.analysis", description=__doc__.split(": ")[1])
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    replace_unprintable()
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError, subprocess.SubprocessError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
