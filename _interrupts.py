"""Ctrl-C of the program: raised where it is heard, remembered where it would be lost.

An import that C++ asked for takes whatever breaks it off for a sign that the module is missing (pyarrow asks for pandas
so), a half-imported module stays broken, and callbacks of C and finalisers can raise nothing at all. There a first
Ctrl-C waits, and is raised as soon as the program is out of there; a second one does not wait.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

INTERRUPTED = 130
"""Exit code: 128 and the signal's number, as shells have it."""
PAUSE = 0.02
IMPORT = "<frozen importlib."


class _State:
    pressed = False
    waiting = False
    """Until a remembered Ctrl-C can be raised."""
    again = False
    """The signal that comes is the remembered one."""


def pressed() -> bool:
    """Whether Ctrl-C was pressed since `listen`."""
    return _State.pressed


def listen() -> None:
    """Takes Ctrl-C from now on; where it was ignored, as in the background of a shell, that stays."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, hear)
        sys.unraisablehook = _not_raised


def deafen() -> None:
    """Nothing is left to interrupt: Python's own end would show tracebacks."""
    if signal.getsignal(signal.SIGINT) is hear:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def hear(_number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT.

    Raises:
        KeyboardInterrupt: unless it has to wait.
    """
    again, _State.again = _State.again, False
    _State.pressed = True
    if _imports(frame) and (again or not _State.waiting):
        _remember()
        return
    if again and not _State.waiting:
        # A second one was raised meanwhile.
        return
    _State.waiting = False
    raise KeyboardInterrupt


def note() -> None:
    """Tells that Ctrl-C was pressed where something else listens for it, such as a server."""
    _State.pressed = True


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT):
            return True
        frame = frame.f_back
    return False


def _remember() -> None:
    _State.waiting = True
    # Of threading's own locks the interrupted thread may hold one.
    _thread.start_new_thread(_press_again, ())


def _press_again() -> None:
    time.sleep(PAUSE)
    _State.again = True
    if hasattr(signal, "pthread_kill"):
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _not_raised(unraisable: Any) -> None:
    if unraisable.exc_type is KeyboardInterrupt:
        _remember()
    else:
        sys.__unraisablehook__(unraisable)
