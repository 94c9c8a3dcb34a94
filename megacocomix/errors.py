"""How a user's mistake leaves the program: one line a problem on stderr, exit code 2, no traceback."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: stopped on a signal after saving, start me again


class UserError(ValueError):
    """Something the user can mend. `problems` are lines that each say what, where and the nearest valid value."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' for the closest of `valid`, else ' Valid: a b c.'; appended to an error line."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else f" Valid: {' '.join(valid)}."


def print_errors(error: UserError) -> None:
    """Print a line a problem on stderr."""
    print("\n".join(f"error: {line}" for line in error.problems), file=sys.stderr, flush=True)


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and exit with its code; a UserError becomes its lines on stderr and exit 2, and so
    does a file that cannot be read or written."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except UserError as error:
        # Before the ranks of a job have met, each knows only of itself; usually all meet the same mistake.
        if os.environ.get("RANK", "0") == "0":
            print_errors(error)
        code = EXIT_USER
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr, flush=True)
        code = EXIT_USER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or EXIT_FINISHED)
