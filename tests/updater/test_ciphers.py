"""A processor without AES instructions asks for ChaCha20 first, and nothing else changes."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

PLAIN = "openssl_conf = openssl_init\n# ssl_conf = commented\n[openssl_init]\n[other]\nx = 1\n"
TELL = """
import sys
from updater.device.ciphers import prefer_fast_ciphers
assert "ssl" not in sys.modules and "hashlib" not in sys.modules
done = prefer_fast_ciphers(sys.argv[1], sys.argv[2])
import os, ssl
context = ssl.create_default_context()
print(done, "OPENSSL_CONF" in os.environ, *[one["name"] for one in context.get_ciphers()])
"""


def ask(folder: Path, flags: str, system: str | None, **environment: str) -> tuple[str, list[str]]:
    """Whether the order was changed, and what a client then offers."""
    (folder / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    if system is not None:
        (folder / "openssl.cnf").write_text(system)
    plain = {name: value for name, value in os.environ.items() if name != "OPENSSL_CONF"}
    told = subprocess.run(
        [sys.executable, "-c", TELL, folder / "cpuinfo", folder / "openssl.cnf"],
        env={**plain, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    done, variable, *names = told.stdout.split()
    assert (variable == "True") == bool(environment)
    return done, names


def usual() -> list[str]:
    return [one["name"] for one in ssl.create_default_context().get_ciphers()]


@pytest.mark.parametrize("system", [None, "", PLAIN])
@pytest.mark.parametrize("flags", ["flags\t\t: fpu sse2 daes", "Features\t: half thumb neon", ""])
def test_without_aes_chacha_comes_first(tmp_path: Path, flags: str, system: str | None) -> None:
    done, names = ask(tmp_path, flags, system)
    assert done == "True"
    assert names[0] == "TLS_CHACHA20_POLY1305_SHA256"
    assert sorted(names) == sorted(usual())


@pytest.mark.parametrize("flags", ["flags\t\t: fpu aes sse2", "Features\t: fp asimd aes pmull"])
def test_with_aes_all_is_as_ever(tmp_path: Path, flags: str) -> None:
    assert ask(tmp_path, flags, PLAIN) == ("False", usual())


@pytest.mark.parametrize(
    "line",
    ["ssl_conf = mine", "system_default = mine", "Ciphersuites = X", ".include /etc/ssl/more.cnf"],
)
def test_a_configuration_that_has_a_say_is_left_alone(tmp_path: Path, line: str) -> None:
    done, names = ask(tmp_path, "flags\t: fpu", f"openssl_conf = a\n[a]\n[b]\n{line}\n")
    assert (done, names) == ("False", usual())


def test_a_configuration_from_the_environment_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.cnf"
    mine.write_text("")
    assert ask(tmp_path, "flags\t: fpu", PLAIN, OPENSSL_CONF=str(mine))[0] == "False"


def test_what_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "openssl.cnf").mkdir()
    assert ask(tmp_path, "flags\t: fpu", None) == ("False", usual())


def test_the_programs_verbs_that_download_ask_for_it(tmp_path: Path) -> None:
    """Before anything has loaded OpenSSL, which would be too late."""
    script = (
        "import sys; import updater.device.ciphers as c\n"
        "c.prefer_fast_ciphers = lambda: print('asked', 'hashlib' in sys.modules)\n"
        "from updater.cli import main; main(sys.argv[1:])"
    )
    for words, told in {
        ("--config", "/nowhere", "install", "x"): "asked False\n",
        ("--config", "/nowhere", "daemon"): "asked False\n",
        ("--config", "/nowhere", "status"): "",
    }.items():
        ran = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
        )
        assert ran.stdout == told, (words, ran.stderr)
