"""The one exception for bad input, and how scripts show it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message names the value that is wrong and the way out."""


def run_main(main: Callable[[], int]) -> int:
    """Run a script's main; a UserError becomes one line on stderr and exit status 2."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is the scripts' output
        return 2
