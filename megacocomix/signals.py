"""Signals that ask a job to stop: noted, and obeyed where stopping loses nothing."""

import signal

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """True once one of `numbers` has come, while it is entered; other handlers are put back on leaving."""

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
