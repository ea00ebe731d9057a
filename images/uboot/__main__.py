"""``python -m images.uboot``: build our U-Boot, or lock its inputs anew."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from images.errors import ImageError
from images.progress import Progress, Reporter
from images.uboot import DEFAULT_CACHE, LOCK_FILE, build, write_lock


def _report(progress: Progress) -> None:
    if progress.finished:
        print(f"{progress.seconds:6.1f} s  {progress.step}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m images.uboot build|lock``; 0 done, 1 failed (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m images.uboot",
        description="Build the boot loader of qemu-arm64-sd from Debian's source package.",
        epilog="example: python -m images.uboot build --output u-boot.bin",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("build", "build, or find in the cache"), ("lock", "pin today's versions")):
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE)
        if verb == "build":
            sub.add_argument("--output", type=Path, help="copy u-boot.bin there")
            sub.add_argument("--force", action="store_true", help="build even if it is cached")
    options = parser.parse_args(arguments)
    cache = options.cache_dir.absolute()
    try:
        if options.verb == "lock":
            print(f"{LOCK_FILE.name}: {len(write_lock(cache))} files")
            return 0
        begun = time.monotonic()
        result = build(cache, force=options.force, reporter=Reporter(_report))
        if options.output:
            shutil.copyfile(result.binary, options.output)
        how = "from the cache" if result.cached else f"built in {time.monotonic() - begun:.1f} s"
        print(f"{result.binary} {result.size_bytes} bytes {result.sha256[:16]} {how}")
    except (ImageError, OSError) as error:
        print(f"uboot: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("uboot: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
