"""Compile Python files for a device; run by the builder in an interpreter of the target's version.

Imports take 2 to 2.6 times as long without compiled files, and a read-only root can't make them.
Files are marked "unchecked hash", so that no times are compared. Libraries are stored without
their sources (`module.pyc` in place of `module.py`); our own package keeps them, for tracebacks.

Usage: python3.11 pyc.py sourceless|cached ROOT PREFIX, where PREFIX is what ROOT is called on the
device.
"""

from __future__ import annotations

import py_compile
import sys
from pathlib import Path

MAGIC_VERSION = (3, 11)


def main() -> None:
    """Compile all `.py` files below ROOT."""
    mode, root, prefix = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if sys.version_info[:2] != MAGIC_VERSION:
        sys.exit(f"this is Python {sys.version.split()[0]}, the images need 3.11's bytecode")
    for source in sorted(root.rglob("*.py")):
        if source.is_symlink():
            if mode == "sourceless":
                target = source.readlink()
                source.with_suffix(".pyc").symlink_to(target.with_suffix(".pyc"))
                source.unlink()
            continue
        name = f"{prefix}/{source.relative_to(root)}"
        if mode == "sourceless":
            compiled = source.with_suffix(".pyc")
        else:
            compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
        py_compile.compile(
            str(source),
            cfile=str(compiled),
            dfile=name,
            doraise=True,
            optimize=0,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        if mode == "sourceless":
            source.unlink()


if __name__ == "__main__":
    main()
