"""Signals that ask a job to stop. They are recorded, and the job stops at the next point where it loses nothing."""

import signal

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """A context that is true once one of the signals `numbers` has arrived. On exit it restores the old handlers."""

    def __init__(self, numbers: tuple[int, ...] = NUMBERS):
        self.numbers, self._received = numbers, False

    def __bool__(self) -> bool:
        return self._received

    def __enter__(self) -> "StopSignal":
        self._handlers = {number: signal.signal(number, self._note) for number in self.numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, _number, _frame) -> None:
        self._received = True
