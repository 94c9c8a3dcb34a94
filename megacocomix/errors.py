"""Errors that a user can fix: one line per problem on stderr, exit code 2, no traceback."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: saved and stopped on a signal, to be started again


class UserError(ValueError):
    """An error that the user can fix. Each line of `problems` gives the error, its place and the nearest valid
    value."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' for the closest of `valid`, else ' Valid: a b c.', to append to an error line."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else f" Valid: {' '.join(valid)}."


def print_errors(error: UserError) -> None:
    """Print one line per problem on stderr."""
    print("\n".join(f"error: {line}" for line in error.problems), file=sys.stderr, flush=True)


def run_cli(main: Callable[[], int | None], is_parallel: bool = False) -> None:
    """Run a command line's `main` and exit with its code. A UserError, or a file that cannot be read or written, is
    printed on stderr and exits with 2. Unless the command `is_parallel`, it is refused in one of several processes."""
    from megacocomix.launchers import check_alone, is_first  # which imports UserError

    try:
        if not is_parallel:
            check_alone(Path(sys.argv[0]).name)
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except UserError as error:
        # The ranks of a job may not be connected yet. Usually all of them have the same error, so only rank 0 prints.
        if is_first():
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
