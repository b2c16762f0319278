"""What every command line shares: exit codes, one-line errors, booleans. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from ldm.errors import UserError


def str2bool(text: str) -> bool:
    """`true/false`, `yes/no`, `on/off`, `t/f`, `y/n`, `1/0` in any case, as an argparse type."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1", "on"):
        return True
    if word in ("no", "false", "f", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not a boolean; use true or false")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's manners: no abbreviated flags, errors in one line, exit code 2."""

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**kwargs)
        self.add_argument("--traceback", action="store_true", help="on an error, show where it came from")

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see --help)\n")


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` and leave the process: 0 when it returns, 2 with one line on a UserError, 130 on Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        if "--traceback" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
