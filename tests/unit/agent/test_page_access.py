"""Who may read the pages: the file of users, and what it costs to check them."""

import base64
from pathlib import Path

import bcrypt
import pytest

from stoker.agent.metrics.page_access import Users, load_tls, load_users, parse_users
from stoker.core.errors import BadInput

# The least that bcrypt allows, so that tests are quick.
COST = 4
TLS = Path(__file__).parents[2] / "support" / "tls"


def hashed(password: str, cost: int = COST) -> str:
    return bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(cost)).decode()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def users() -> Users:
    return Users({"ann": hashed("open: sesame"), "bob": hashed("ü" * 40)})


@pytest.mark.parametrize(
    ("header", "is_admitted"),
    [
        (basic("ann", "open: sesame"), True),
        (basic("ann", "open: sesame").replace("Basic", "BASIC"), True),
        (basic("bob", "ü" * 40), True),  # 80 bytes, of which bcrypt looks at 72
        (basic("ann", "open: sesam"), False),
        (basic("ann", ""), False),
        (basic("bob", "open: sesame"), False),
        (basic("eve", "open: sesame"), False),
        (basic("", ""), False),
        (None, False),
        ("", False),
        ("Basic", False),
        ("Basic !!!", False),
        ("Basic " + base64.b64encode(b"ann").decode(), False),
        ("Basic " + base64.b64encode(b"\xff:x").decode(), False),
        ("Bearer " + base64.b64encode(b"ann:open: sesame").decode(), False),
    ],
)
def test_who_is_admitted(users: Users, header: str | None, is_admitted: bool) -> None:
    assert users.admit(header) is is_admitted
    assert users.admit(header) is is_admitted  # from memory it is the same


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The hashes that bcrypt was asked about."""
    asked: list[bytes] = []
    real = bcrypt.checkpw

    def check(password: bytes, hashed_password: bytes) -> bool:
        asked.append(hashed_password)
        return real(password, hashed_password)

    monkeypatch.setattr(bcrypt, "checkpw", check)
    return asked


def test_a_scrape_with_a_known_password_costs_no_bcrypt(users: Users, checks: list[bytes]) -> None:
    for _ in range(3):
        assert users.admit(basic("ann", "open: sesame"))
    assert len(checks) == 1
    # A wrong one is checked each time, and does not push the right one out.
    for _ in range(2):
        assert not users.admit(basic("ann", "wrong"))
    assert len(checks) == 3
    assert users.admit(basic("ann", "open: sesame"))
    assert len(checks) == 3


def test_a_wrong_user_costs_what_the_costliest_password_does(checks: list[bytes]) -> None:
    cheap, dear = hashed("a"), hashed("b", COST + 1)
    users = Users({"ann": cheap, "bob": dear})
    assert not users.admit(basic("eve", "b"))  # the right password of somebody else
    assert checks == [dear.encode()]


def test_a_file_as_htpasswd_writes_it() -> None:
    one, two = hashed("a"), hashed("b").replace("$2b$", "$2y$")
    text = f"# scrapers\n\nprometheus:{one}\n  ann:{two}  \r\n"
    assert parse_users(text, "users") == {"prometheus": one, "ann": two}
    assert Users(parse_users(text, "users")).admit(basic("ann", "b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "users: wanted at least one user, found none"),
        ("# nobody\n", "users: wanted at least one user, found none"),
        (f"ann:{hashed('a')}\nann", "users:2: wanted USER:HASH with a bcrypt hash"),
        ("ann:secret", "users:1: wanted USER:HASH with a bcrypt hash"),
        ("ann:$apr1$salt$hash", "users:1: wanted USER:HASH with a bcrypt hash"),
        (f":{hashed('a')}", "users:1: wanted USER:HASH with a bcrypt hash"),
        (f"ann:{hashed('a')}x", "users:1: wanted USER:HASH with a bcrypt hash"),
        ("ann:$2b$31$" + "a" * 53, "users:1: wanted a cost of 4 to 15, found 31"),
        ("ann:$2b$03$" + "a" * 53, "users:1: wanted a cost of 4 to 15, found 03"),
        (f"ann:{hashed('a')}\nann:{hashed('b')}", "users:2: user 'ann' is there twice"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(BadInput) as found:
        parse_users(text, "users")
    assert str(found.value).startswith(message)
    assert "secret" not in str(found.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    absent, binary, large = (tmp_path / name for name in ("absent", "binary", "large"))
    binary.write_bytes(b"\xff\xfe")
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for path, message in (
        (absent, "No such file or directory"),
        (tmp_path, "Is a directory"),
        (binary, "is not UTF-8 text"),
        (large, "wanted at most 1048576 bytes"),
    ):
        with pytest.raises(BadInput, match=f"^basic_auth_file: {path}: {message}"):
            load_users(path, "basic_auth_file")


def test_a_certificate_with_its_key_is_loaded() -> None:
    assert load_tls(TLS / "server.pem", TLS / "server.key", TLS / "ca.pem").cert_store_stats() == {
        "x509": 1,
        "crl": 0,
        "x509_ca": 1,
    }


@pytest.mark.parametrize(
    ("cert", "key", "client_ca", "message"),
    [
        ("absent", "server.key", None, "metrics.tls_cert: {absent}: No such file or directory"),
        ("server.pem", "absent", None, "metrics.tls_key: {absent}: No such file or directory"),
        ("server.pem", "scraper.key", None, "metrics.tls_cert, metrics.tls_key: {cert}, {key}: no"),
        (
            "server.pem",
            "encrypted.key",
            None,
            "metrics.tls_cert, metrics.tls_key: {cert}, {key}: no",
        ),
        ("README", "server.key", None, "metrics.tls_cert, metrics.tls_key: {cert}, {key}: no"),
        ("server.pem", "server.key", "absent", "metrics.tls_client_ca: {absent}: No such file"),
        ("server.pem", "server.key", "README", "metrics.tls_client_ca: {ca}: no certificates: "),
    ],
)
def test_what_is_wrong_with_a_certificate_is_named(
    cert: str, key: str, client_ca: str | None, message: str
) -> None:
    with pytest.raises(BadInput) as found:
        load_tls(TLS / cert, TLS / key, None if client_ca is None else TLS / client_ca)
    wanted = message.format(
        absent=TLS / "absent", cert=TLS / cert, key=TLS / key, ca=TLS / (client_ca or "")
    )
    assert str(found.value).startswith(wanted)
