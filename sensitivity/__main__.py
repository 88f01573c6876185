"""`python -m sensitivity` is the same as `sensitivity`."""

import os
import signal
import sys


def run() -> int:
    """Run the command line; Ctrl-C before it has begun, or while Python ends, prints no traceback."""
    for name in ("stdout", "stderr"):  # closed, as by `>&-`: what is printed goes nowhere, and the verb does its work
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open
    try:
        from sensitivity.cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # an interrupt that came through code in a string, as in namedtuple(), would make Python kill itself at its end
        # instead of exiting with our code, unless other such code ran since
        exec("")


if __name__ == "__main__":
    sys.exit(run())
