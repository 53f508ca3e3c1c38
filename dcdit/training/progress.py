"""How far a long run is: a bar on a terminal, whole lines now and then in a log."""

from __future__ import annotations

import shutil
import sys
import time

SECONDS = 10.0  # between two lines of a log


class Progress:
    """Counts from `initial` to `total` steps on stderr; says nothing unless `shown`."""

    def __init__(self, initial: int, total: int, shown: bool = True) -> None:
        self.initial, self.total, self.shown = initial, total, shown
        self.step, self.start, self.last = initial, time.monotonic(), 0.0
        self.bar = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            # A terminal that says it has no columns gets 80.
            self.bar = tqdm(initial=initial, total=total, unit="step", ncols=shutil.get_terminal_size().columns)

    def advance(self) -> None:
        """One step further."""
        self.step += 1
        if self.bar is not None:
            self.bar.update()

    def report(self, text: str) -> None:
        """Numbers of the step that was counted last."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.shown and (time.monotonic() - self.last >= SECONDS or self.step == self.total):
            self.last = time.monotonic()
            left = (self.last - self.start) / (self.step - self.initial) * (self.total - self.step)
            print(f"step {self.step} of {self.total}: {text}, {_clock(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
