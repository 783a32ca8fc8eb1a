"""Who may read the pages: the certificate of the door, and the users in a file.

The file has lines of USER:HASH as `htpasswd -B` writes them (bcrypt); empty lines and lines that
begin with # are passed over. A wrong user costs as much time as a wrong password.
"""

import base64
import binascii
import hmac
import re
import secrets
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path

import bcrypt

from stoker.core.errors import BadInput, shown

# The file is written by hand; what is larger is some other file.
FILE_BYTES_MAX = 1 << 20
# One more doubles the time of a check; 12 takes about a quarter of a second.
COST_MAX = 15
# bcrypt looks no further, and neither does htpasswd.
_PASSWORD_BYTES_MAX = 72
_HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}", re.ASCII)


class Users:
    """Who may scrape. Safe to use from any thread."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        """Take the bcrypt hash of each user's password; there is at least one."""
        self._hashes = {user: text.encode("ascii") for user, text in hashes.items()}
        self._costliest = max(self._hashes.values(), key=_cost)
        self._key = secrets.token_bytes(32)
        self._verified: dict[str, bytes] = {}  # the password that was right last, by our own key
        self._checking = threading.Lock()  # so that guessing costs no more than one processor

    def admit(self, authorization: str | None) -> bool:
        """Whether the header `Authorization` names a user with the right password."""
        given = _parse_basic(authorization)
        if given is None:
            return False
        user, password = given
        digest = hmac.digest(self._key, password, "sha256")
        if hmac.compare_digest(self._verified.get(user, b""), digest):
            return True
        with self._checking:
            is_right = bcrypt.checkpw(password, self._hashes.get(user, self._costliest))
        if is_right and user in self._hashes:
            self._verified[user] = digest
            return True
        return False


def load_users(path: Path, what: str) -> Users:
    """Read the file of users; raises BadInput that names `what`, the file and the line."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise BadInput(f"{what}: {path}: wanted at most {FILE_BYTES_MAX} bytes")
        text = content.decode()
    except OSError as error:
        raise BadInput(f"{what}: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{what}: {path}: is not UTF-8 text") from error
    return Users(parse_users(text, f"{what}: {path}"))


def parse_users(text: str, where: str) -> Mapping[str, str]:
    """Return the hash of each user; raises BadInput that names `where` and the line."""
    hashes: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        user, colon, value = line.partition(":")
        found = _HASH.fullmatch(value)
        if not (user and colon and found):
            # The hash is not shown: it may be a password that somebody wrote in plain.
            raise BadInput(
                f"{where}:{number}: wanted USER:HASH with a bcrypt hash, as `htpasswd -B` writes it"
            )
        if not 4 <= int(found[1]) <= COST_MAX:
            raise BadInput(f"{where}:{number}: wanted a cost of 4 to {COST_MAX}, found {found[1]}")
        if user in hashes:
            raise BadInput(f"{where}:{number}: user {shown(user)} is there twice")
        hashes[user] = value
    if not hashes:
        raise BadInput(f"{where}: wanted at least one user, found none")
    return hashes


def load_tls(cert: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """Return what encrypts the door; raises BadInput that names the option and the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for option, path in (("tls_cert", cert), ("tls_key", key)):
        _check_readable(path, f"metrics.{option}")
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BadInput(
            f"metrics.tls_cert, metrics.tls_key: {cert}, {key}: no certificate with its private "
            f"key: {error}"
        ) from error
    if client_ca is not None:
        _check_readable(client_ca, "metrics.tls_client_ca")
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise BadInput(
                f"metrics.tls_client_ca: {client_ca}: no certificates: {error}"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    # Without this OpenSSL asks on the terminal.
    raise ValueError("the key is encrypted, and nobody is there to tell its password")


def _check_readable(path: Path, what: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise BadInput(f"{what}: {path}: {error.strerror}") from error


def _parse_basic(authorization: str | None) -> tuple[str, bytes] | None:
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(value.strip(), validate=True).partition(b":")
        name = user.decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (name, password[:_PASSWORD_BYTES_MAX]) if colon else None


def _cost(value: bytes) -> bytes:
    return value[4:6]
