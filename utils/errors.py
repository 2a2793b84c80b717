"""The one exception that a user is meant to read, and how a script ends."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Say what is wrong, one problem a line: what, found, expected, which flag."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; exit 2 with one line per problem on bad input, 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
