"""What a Chrome trace of torch.profiler shows: the teacher's overlap with the student, launches, waits. Times are in
microseconds."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch

TEACHER = "megacocomix.teacher"  # marks the making of targets


@contextlib.contextmanager
def marked_teacher() -> Iterator[None]:
    """Marks the making of teacher targets in a trace."""
    from megacocomix.teacher.targets import TargetSource

    make = TargetSource.passes

    def marked(*arguments):
        passes = make(*arguments)
        while True:
            with torch.profiler.record_function(TEACHER):
                try:
                    next(passes)
                except StopIteration as end:
                    return end.value
            yield

    with mock.patch.object(TargetSource, "passes", marked):
        yield


class Kernels(NamedTuple):
    """What a trace shows."""

    teacher: float
    """Time in which a kernel of the teacher runs."""
    overlapped: float
    """The part of it in which a kernel of the student runs too."""
    teacher_streams: set[int]
    student_streams: set[int]
    teacher_launches: int
    student_launches: int
    waiting: float
    """Time in which the host waits for the device."""
    queueing: float
    """Time in launches of more than 100 µs: the stream's queue is full."""

    @property
    def share(self) -> float:
        """Of the teacher's time, the part that costs nothing."""
        return self.overlapped / self.teacher if self.teacher else 0.0


def analyse(events: Iterable[dict]) -> Kernels:
    """A kernel is the teacher's if it was launched, on any thread, while teacher targets were made: backward passes are
    launched by a thread of their own, but the caller waits for it."""
    events = [event for event in events if event.get("ph") == "X"]
    of = lambda *kinds: [event for event in events if event.get("cat") in kinds]
    span = lambda event: (event["ts"], event["ts"] + event["dur"])
    marks = [span(event) for event in of("user_annotation", "cpu_op") if event["name"] == TEACHER]
    calls = of("cuda_runtime", "cuda_driver")
    launched = {event["args"]["correlation"]: event["ts"] for event in calls if "correlation" in event.get("args", {})}
    sides: tuple[list, list] = ([], [])
    for kernel in of("kernel"):
        at = launched.get(kernel["args"].get("correlation"), float("-inf"))
        sides[any(start <= at <= stop for start, stop in marks)].append(kernel)
    student, teacher = sides
    spans = [merge(map(span, side)) for side in (teacher, student)]
    long = lambda event: event["dur"] > 100 and "Launch" in event["name"]
    return Kernels(
        teacher=sum(stop - start for start, stop in spans[0]),
        overlapped=common(*spans),
        teacher_streams={kernel["args"]["stream"] for kernel in teacher},
        student_streams={kernel["args"]["stream"] for kernel in student},
        teacher_launches=len(teacher),
        student_launches=len(student),
        waiting=sum(event["dur"] for event in calls if "Synchronize" in event["name"]),
        queueing=sum(event["dur"] for event in filter(long, calls)),
    )


def merge(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of spans of time, in order."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def common(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    """The time that is in both of two unions."""
    total, i, j = 0.0, 0, 0
    while i < len(ours) and j < len(theirs):
        total += max(0.0, min(ours[i][1], theirs[j][1]) - max(ours[i][0], theirs[j][0]))
        i, j = (i + 1, j) if ours[i][1] < theirs[j][1] else (i, j + 1)
    return total
