"""Stop signals: the first one lets the current step finish, the second one acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests(*, ignore_repeats: bool = False) -> Iterator[threading.Event]:
    """Catch SIGINT and SIGTERM inside the block: the first one sets the event, the next one raises KeyboardInterrupt.

    With `ignore_repeats` later signals do nothing. A rank needs this, because one Ctrl-C reaches it twice: from the
    terminal and from torchrun.
    """
    requested = threading.Event()

    def on_signal(signum: int, frame: object) -> None:
        if requested.is_set() and not ignore_repeats:
            raise KeyboardInterrupt
        requested.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield requested
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
