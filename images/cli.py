"""The builder's command line: build, boot, deb, manifest, list, relock.

Exit codes: 0 done, 1 the build failed (one line says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.status import Status

from images.builder import Places, build_target, read_manifest, relock_architecture
from images.console import attend
from images.deb import build_deb
from images.errors import ImageError
from images.locks import LOCK_DIR
from images.progress import Progress
from images.recipe import load_recipe, planted_bugs, recipe_names

_EXAMPLES = """examples:
  python -m images build qemu-arm64 --variant v1 --variant v2
  python -m images build qemu-arm64 --variant v1+never-fsync
  python -m images boot qemu-arm64
  python -m images manifest qemu-arm64
  python -m images deb --output-dir build
  python -m images relock
"""


class _Display:
    """Draws reports: a spinner with the running step, and a line for each one that took time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status = console.status("looking what there is to do")

    def __enter__(self) -> _Display:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.detail == "note":
            self._console.print(progress.step, markup=False, highlight=False, style="yellow")
        elif progress.finished:
            detail = f" ({progress.detail})" if progress.detail else ""
            self._console.print(
                f"{progress.seconds:6.1f} s  {progress.step}{detail}",
                markup=False,
                highlight=False,
            )
        else:
            share = f" {progress.done}/{progress.total}" if progress.total else ""
            detail = f": {progress.detail}" if progress.detail else ""
            self._status.update(f"{progress.step}{share}{detail}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m images",
        description="Build the targets' images from Debian packages. No privileges are needed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build a target, or find it built")
    build.add_argument("target", help="a recipe's name; see `list`")
    build.add_argument(
        "--variant", action="append", default=[], metavar="NAME", help="repeatable; v1 always is"
    )
    build.add_argument(
        "--relock", action="store_true", help="lock the archive's present versions first"
    )
    build.add_argument(
        "--relock-if-gone",
        action="store_true",
        help="where a locked version has gone, warn and use the present ones, lock file unchanged",
    )
    defaults = Places()
    for name, meaning in (
        ("build", "where images go"),
        ("cache", "where packages and trees are kept"),
        ("updater", "the client's package to install"),
    ):
        build.add_argument(
            f"--{name}-dir", type=Path, default=getattr(defaults, name), help=meaning
        )
    deb = commands.add_parser("deb", help="build the client's Debian package")
    deb.add_argument("--output-dir", type=Path, default=defaults.build, help="where it goes")
    deb.add_argument("--updater-dir", type=Path, default=defaults.updater, help="the client")
    manifest = commands.add_parser("manifest", help="print what a build left behind, as JSON")
    manifest.add_argument("target")
    manifest.add_argument("--build-dir", type=Path, default=defaults.build)
    boot = commands.add_parser("boot", help="boot a target in QEMU, its console on this terminal")
    boot.add_argument("target")
    boot.add_argument(
        "--disk", type=Path, help="keeps what is written; default: device.img beside the images"
    )
    commands.add_parser("list", help="print the targets, their variants and planted bugs")
    relock = commands.add_parser("relock", help="lock the archive's present versions")
    relock.add_argument("architecture", nargs="*", help="arm64, amd64; all by default")
    relock.add_argument("--cache-dir", type=Path, default=defaults.cache)
    return parser


def _build(options: argparse.Namespace) -> None:
    places = Places(
        options.build_dir.absolute(), options.cache_dir.absolute(), options.updater_dir.absolute()
    )
    with _Display(Console(stderr=True)) as display:
        images = build_target(
            options.target,
            options.variant,
            progress=display,
            places=places,
            relock=options.relock,
            relock_if_gone=options.relock_if_gone,
        )
    print(images.directory / "manifest.json")


def _boot(options: argparse.Namespace) -> None:
    with _Display(Console(stderr=True)) as display:
        images = build_target(options.target, progress=display, relock_if_gone=True)
    print("the device's console follows; Ctrl-A X ends it", file=sys.stderr)
    attend(images, options.disk or images.path("device.img"))


def _list() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        print(f"{name}: {recipe.description}")
        print(f"    variants: {', '.join(recipe.variants)}")
    print(f"planted (variant+NAME): {', '.join((*planted_bugs(), 'single-env'))}")


def _relock(options: argparse.Namespace) -> None:
    known = sorted({load_recipe(name).architecture for name in recipe_names()})
    for architecture in options.architecture or known:
        if architecture not in known:
            raise ImageError(
                f"no recipe is for architecture {architecture!r}: choose {', '.join(known)}"
            )
        path = LOCK_DIR / f"{architecture}.lock"
        lock = relock_architecture(architecture, options.cache_dir.absolute(), path)
        print(f"{path.name}: {len(lock.packages)} packages")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "build":
            _build(options)
        elif options.command == "boot":
            _boot(options)
        elif options.command == "deb":
            print(build_deb(options.output_dir.absolute(), updater=options.updater_dir.absolute()))
        elif options.command == "manifest":
            print(json.dumps(read_manifest(options.target, options.build_dir), indent=2))
        elif options.command == "list":
            _list()
        else:
            _relock(options)
    except ImageError as error:
        print(f"images: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"images: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("images: interrupted; what was finished stays", file=sys.stderr)
        return 1
    return 0
