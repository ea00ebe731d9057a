"""Plays a board on its standard input and output: a bootloader, a start, a shell. For tests.

Variants: `silent` says nothing, `hangs` stops before it is ready, `chatty` prints for ever.
"""

import os
import re
import select
import subprocess
import sys
import time
import uuid


def say(text: str) -> None:
    os.write(1, text.encode())


def typed(timeout_s: float) -> bytes:
    readable, _, _ = select.select([0], [], [], timeout_s)
    return os.read(0, 4096) if readable else b""


def bootloader() -> None:
    say("\r\nLittle board 1.0\r\nHit any key to stop\r\n")
    if not typed(0.3):
        return
    say("=> ")
    while True:
        line = typed(60)
        if b"boot" in line:
            return
        say("\r\n=> ")


def system() -> None:
    say("Starting kernel ...\r\nBROWNOUT INIT slot=a\r\n")
    if variant == "hangs":
        time.sleep(3600)
    time.sleep(0.2)
    say(f"BROWNOUT READY version=v1 slot=a boot_id={uuid.uuid4()}\r\nboard# ")
    line = b""
    while True:
        got = typed(60)
        say(got.decode(errors="replace").replace("\n", "\r\n"))
        line += got
        if b"\n" not in got:
            continue
        shell(line.decode(errors="replace"))
        line = b""
        say("board# ")


def shell(text: str) -> None:
    """Enough of a shell for labgrid's ShellDriver: its `run` function is played, too."""
    text = text.strip()
    run = re.match(r"^MARKER='(\w+)''(\w+)' run (.*)$", text, re.DOTALL)
    if text.startswith("reboot"):
        os.execv(sys.executable, [sys.executable, "-S", "-E", __file__, variant])
    command = f"sh -c {run[3]}" if run else text
    if not run and text.startswith("run()"):
        return
    marker = run[1] + run[2] if run else ""
    say(marker)
    with subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        assert child.stdout is not None
        while data := os.read(child.stdout.fileno(), 4096):
            say(data.decode(errors="replace").replace("\n", "\r\n"))
    if run:
        say(f"{marker} {child.returncode}\r\n")


variant = sys.argv[1] if len(sys.argv) > 1 else ""
if variant == "silent":
    time.sleep(3600)
bootloader()
while variant == "chatty":
    say("still here\r\n")
    time.sleep(0.05)
system()
