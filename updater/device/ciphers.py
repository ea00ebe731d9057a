"""Which TLS cipher a device asks for first.

A processor without AES instructions (most 32-bit ARM boards, the Raspberry Pi 4) decrypts ChaCha20
about twice as fast as AES-GCM; both are as good. OpenSSL asks for AES first on any processor, and
Python has no call for the order of TLS 1.3 (`set_ciphers` is about TLS 1.2). OpenSSL reads it from
its configuration file (config(5), "SSL Configuration"; SSL_CONF_cmd(3), "Ciphersuites"), so it is
given one: the system's, with that order in it. One that says anything about TLS is left alone, and
so is one that the environment names.
"""

from __future__ import annotations

import os
import re

_VARIABLE = "OPENSSL_CONF"
_SYSTEM = "/etc/ssl/openssl.cnf"
_PROCESSOR = "/proc/cpuinfo"
_MOST_BYTES = 1 << 20
_ORDER = """
[brownout_tls]
system_default = brownout_ciphers
[brownout_ciphers]
Ciphersuites = TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384
"""


def prefer_fast_ciphers(processor: str = _PROCESSOR, system: str = _SYSTEM) -> bool:
    """Have OpenSSL ask for ChaCha20 first if this processor lacks AES; whether it now does.

    Must come before anything that loads OpenSSL (`hashlib` does). Never fails: without it,
    downloads are only slower.
    """
    try:
        if _VARIABLE in os.environ or _has_aes(processor):
            return False
        text = _configuration(_read(system))
        if text is None:
            return False
        handle = os.memfd_create("openssl")
    except (OSError, UnicodeError):
        return False
    try:
        os.write(handle, text.encode())
        os.environ[_VARIABLE] = f"/proc/self/fd/{handle}"
        import hashlib  # noqa: F401, PLC0415 - this reads it
    except OSError:
        return False
    finally:
        # Not for the programs that we start.
        os.environ.pop(_VARIABLE, None)
        os.close(handle)
    return True


def _has_aes(processor: str) -> bool:
    """Whether the first processor's flags (x86) or features (ARM) have AES."""
    with open(processor, encoding="utf-8") as file:  # noqa: PTH123 - start-up path
        for line in file:
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return "aes" in values.split()
    return False


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - start-up path
            return file.read(_MOST_BYTES)
    except FileNotFoundError:
        return ""


def _configuration(system: str) -> str | None:
    """The system's configuration with our order; None if it has a say in TLS itself."""
    lines = [line.partition("#")[0].strip() for line in system.splitlines()]
    if any(re.match(r"ssl_conf\b|system_default\b|\.include\b|Cipher", line) for line in lines):
        return None
    main = lines[: next((i for i, line in enumerate(lines) if line.startswith("[")), len(lines))]
    named = [re.fullmatch(r"openssl_conf\s*=\s*(\w+)", line) for line in main]
    sections = [match[1] for match in named if match]
    if sections:
        # A section that is opened again goes on.
        return f"{system}\n[{sections[-1]}]\nssl_conf = brownout_tls\n{_ORDER}"
    return f"openssl_conf = brownout\n{system}\n[brownout]\nssl_conf = brownout_tls\n{_ORDER}"
