"""End of a rank whose launcher was killed.

Lightning's launcher ends the other ranks when one fails, but nothing ends them when the launching process itself is
killed. They would wait for it in a collective, with NCCL until the timeout of half an hour.
"""

from __future__ import annotations

import os
import threading

import psutil

_INTERVAL_S = 5.0


class LauncherWatch:
    """Ends this process soon after the rank that launched it ended; does nothing in a process that no rank launched.

    A thread watches, because the main thread may wait in a collective. Lightning launches ranks by its own command
    line, which is how the launcher is recognized. Other launchers end their ranks themselves.

    Args:
        interval_s: Seconds between two looks at the launcher.
    """

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._is_over = threading.Event()

    def start(self) -> bool:
        """Start to watch.

        Returns:
            Whether a rank launched this process.
        """
        own = psutil.Process()
        try:
            parent = own.parent()
            is_launched = parent is not None and parent.cmdline()[1:] == own.cmdline()[1:]
        except psutil.Error:  # the parent belongs to another user, or has ended
            is_launched = False
        if is_launched:
            self._is_over = threading.Event()
            threading.Thread(target=self._watch, args=(os.getppid(), self._is_over), daemon=True).start()
        return is_launched

    def stop(self) -> None:
        """Stop to watch."""
        self._is_over.set()

    def _watch(self, launcher_pid: int, is_over: threading.Event) -> None:
        while not is_over.wait(self._interval_s):
            if os.getppid() != launcher_pid:
                os.write(2, b"The rank that launched this one has ended, so this one ends too.\n")
                os._exit(1)
