"""Python imports it at the start of every process of an attempt: it kills the attempt at an event below the store."""

import os
import signal
import sys

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.copyfile"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENT, _STORE = int(os.environ["SFT_CAMPAIGN_EVENT"]), os.environ["SFT_CAMPAIGN_STORE"]
_GROUP = int(os.environ.setdefault("SFT_CAMPAIGN_GROUP", str(os.getpgrp())))  # of the first process; ranks have others
_num_events = 0


def _count(event, arguments):
    global _num_events
    if event not in _EVENTS or not isinstance(arguments[0], (str, os.PathLike)) or _STORE not in str(arguments[0]):
        return
    if event == "open" and not arguments[2] & _WRITES:
        return
    _num_events += 1
    if _num_events == _EVENT:
        os.killpg(_GROUP, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_count)
