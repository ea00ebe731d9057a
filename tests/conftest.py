"""What all tests need: interrupts that can be sent to children.

A shell starts what it puts in the background with SIGINT ignored, and every child inherits that.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
