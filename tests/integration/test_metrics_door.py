"""The door of the pages: real sockets, TLS, users, and crowds that connect and say nothing."""

import base64
import gzip
import select
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from email.message import Message
from pathlib import Path

import bcrypt
import pytest
from tests.support.pages import read_openmetrics
from tests.support.snapshots import EVENTFUL, dcgm_page, eventful, own_page

from stoker.agent.config import HostnameLabel, MetricsConfig
from stoker.agent.metrics import page_server
from stoker.agent.metrics.exporter import MetricsServer, accepts_openmetrics
from stoker.agent.metrics.page_server import CONNECTIONS_MAX
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.telemetry import XidCount
from stoker.core.addresses import Address
from stoker.core.errors import BadInput, InUse

SECONDS_MAX = 20.0  # no answer of this machine takes so long
TLS = Path(__file__).parents[1] / "support" / "tls"
LOOPBACK = Address("127.0.0.1", 0)
PASSWORD = "open sesame"
# How a client finds out that it is not let in.
NO_ANSWER = (urllib.error.URLError, ssl.SSLError, ConnectionError)


@contextmanager
def serving(
    config: MetricsConfig | None = None, take: Callable[[], Snapshot] = eventful
) -> Generator[MetricsServer]:
    server = MetricsServer(LOOPBACK, take, config)
    try:
        yield server
    finally:
        server.close()


def ask(
    server: MetricsServer,
    path: str,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
) -> tuple[int, Message, bytes]:
    """Return the status, the headers and the body of an answer."""
    scheme = "http" if tls is None else "https"
    url = f"{scheme}://{server.address}{path}"
    request = urllib.request.Request(url, headers=dict(headers or {}), method=method)
    # No proxy: the environment may name one, and it does not know this machine's loopback.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls)
    )
    try:
        with opener.open(request, timeout=SECONDS_MAX) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with closing(error):
            return error.code, error.headers, error.read()


def without_process(page: str) -> str:
    """Leave out what the process tells of itself: it changes from scrape to scrape."""
    return "".join(
        line for line in page.splitlines(keepends=True) if "process_" not in line.split("{")[0]
    )


def test_both_pages_and_what_is_said_elsewhere() -> None:
    with serving() as server:
        status, headers, body = ask(server, "/metrics")
        assert status == 200
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert without_process(body.decode()) == without_process(own_page(eventful()))
        assert "\nprocess_resident_memory_bytes " in body.decode()
        status, headers, body = ask(server, "/metrics/dcgm?x=1")
        assert (status, body.decode()) == (200, dcgm_page(eventful()))
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        status, _, body = ask(server, "/")
        assert (status, body) == (200, b"pages for Prometheus: /metrics, /metrics/dcgm\n")
        for path in ("/metric", "/metrics/", "/favicon.ico", "/%00", "//["):
            status, _, body = ask(server, path)
            assert (status, body) == (404, b"no such page; there is /metrics, /metrics/dcgm\n")


def test_the_spelling_of_the_host_is_an_option() -> None:
    with serving(MetricsConfig(dcgm_hostname_label=HostnameLabel.LOWER)) as server:
        _, _, body = ask(server, "/metrics/dcgm")
    assert body.decode() == dcgm_page(eventful(), "hostname")


@pytest.mark.parametrize("path", ["/", "/metrics", "/metrics/dcgm", "/nowhere"])
def test_head_says_what_get_would_say_without_the_page(path: str) -> None:
    with serving() as server:
        got = ask(server, path)
        status, headers, body = ask(server, path, method="HEAD")
    assert (status, body) == (got[0], b"")
    assert headers["Content-Type"] == got[1]["Content-Type"]
    assert int(headers["Content-Length"]) > 0


def test_other_methods_are_not_there() -> None:
    with serving() as server:
        assert ask(server, "/metrics", method="DELETE")[0] == 501


PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


def test_prometheus_gets_openmetrics_packed() -> None:
    with serving() as server:
        asked = {"Accept": PROMETHEUS_ACCEPT, "Accept-Encoding": "gzip"}
        _, headers, body = ask(server, "/metrics", asked)
        assert headers["Content-Type"] == (
            "application/openmetrics-text; version=1.0.0; charset=utf-8"
        )
        assert headers["Content-Encoding"] == "gzip"
        names = {family.name for family in read_openmetrics(gzip.decompress(body).decode())}
        assert {"stoker_gpu_energy_joules", "stoker_gpu_info", "process_cpu_seconds"} <= names
        # dcgm-exporter's names of counters are none in OpenMetrics.
        _, headers, body = ask(server, "/metrics/dcgm", asked)
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert gzip.decompress(body).decode() == dcgm_page(eventful())


def test_a_port_in_use_and_an_address_of_another_machine_are_named() -> None:
    with serving() as server:
        message = f"metrics.listen: {server.address}: Address already in use"
        with pytest.raises(InUse, match=message):
            MetricsServer(server.address, eventful)
    with pytest.raises(BadInput, match=r"metrics\.listen: 192\.0\.2\.1:9410: Cannot assign"):
        MetricsServer(Address("192.0.2.1", 9410), eventful)


def trusting(certificate: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=TLS / "ca.pem")
    if certificate is not None:
        context.load_cert_chain(TLS / f"{certificate}.pem", TLS / f"{certificate}.key")
    return context


def large() -> Snapshot:
    """A page of some ten megabytes."""
    xids = {f"GPU-{i}": {n: XidCount(1, 1.0) for n in range(256)} for i in range(256)}
    return replace(eventful(), view=replace(EVENTFUL, xids=xids))


ENCRYPTED = MetricsConfig(tls_cert=TLS / "server.pem", tls_key=TLS / "server.key")


def test_an_encrypted_door_and_who_speaks_plainly() -> None:
    with serving(ENCRYPTED) as server:
        assert ask(server, "/", tls=trusting())[0] == 200
        with pytest.raises(NO_ANSWER):
            ask(server, "/")
        assert ask(server, "/", tls=trusting())[0] == 200


def test_a_scraper_has_to_show_a_certificate_of_the_right_descent() -> None:
    with serving(replace(ENCRYPTED, tls_client_ca=TLS / "ca.pem")) as server:
        assert ask(server, "/", tls=trusting("scraper"))[0] == 200
        for certificate in (None, "stranger"):
            with pytest.raises(NO_ANSWER):
                ask(server, "/", tls=trusting(certificate))


def test_files_that_cannot_be_used_are_named_before_anything_listens(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for config, option in (
        (replace(ENCRYPTED, tls_key=absent), "tls_key"),
        (replace(ENCRYPTED, tls_client_ca=absent), "tls_client_ca"),
        (MetricsConfig(basic_auth_file=absent), "basic_auth_file"),
    ):
        with pytest.raises(BadInput, match=f"^metrics.{option}: {absent}: No such file"):
            MetricsServer(LOOPBACK, eventful, config)


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text(f"ann:{bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n")
    return path


def test_a_user_needs_the_password_and_a_wrong_user_looks_like_a_wrong_password(
    users_file: Path,
) -> None:
    def basic(text: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}

    with serving(MetricsConfig(basic_auth_file=users_file)) as server:
        assert ask(server, "/metrics", basic(f"ann:{PASSWORD}"))[0] == 200
        refusals = [
            ask(server, path, headers)
            for path in ("/metrics", "/metrics/dcgm", "/", "/nowhere")
            for headers in ({}, basic("ann:wrong"), basic(f"eve:{PASSWORD}"))
        ]
    assert {status for status, _, _ in refusals} == {401}
    assert {body for _, _, body in refusals} == {b"a user and a password are needed\n"}
    assert {headers["WWW-Authenticate"].split()[0] for _, headers, _ in refusals} == {"Basic"}


def silent(server: MetricsServer, said: bytes = b"GET /met") -> socket.socket:
    """Return a connection that begins to ask and goes no further."""
    connection = socket.create_connection((server.address.host, server.address.port), SECONDS_MAX)
    connection.sendall(said)
    return connection


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        (PROMETHEUS_ACCEPT, True),
        ("application/openmetrics-text", True),
        ("text/plain, application/openmetrics-text; version=1.0.0", True),
        ("application/openmetrics-text;version=0.0.1,text/plain;q=0.5", False),
        ("application/openmetrics-text;version=0.0.1,application/openmetrics-text", True),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;version=abc", False),
        ("application/openmetrics-textual", False),
        ("text/plain;version=x", False),
        ("*/*", False),
        (";;;=,", False),
        ("", False),
    ],
)
def test_who_gets_openmetrics(accept: str, is_openmetrics: bool) -> None:
    assert accepts_openmetrics(accept) is is_openmetrics


@pytest.mark.parametrize("config", [MetricsConfig(), ENCRYPTED], ids=["plain", "encrypted"])
def test_a_crowd_that_says_nothing_keeps_nobody_out(config: MetricsConfig) -> None:
    tls = trusting() if config.tls_cert else None
    with serving(config) as server:
        crowd = [silent(server, b"") for _ in range(2 * CONNECTIONS_MAX)]
        try:
            for _ in range(3):
                assert ask(server, "/", tls=tls)[0] == 200
            threads = [each for each in threading.enumerate() if each.name == "page"]
            assert len(threads) <= CONNECTIONS_MAX
            assert crowd[0].recv(1) == b""  # it had to make room
        finally:
            for each in crowd:
                each.close()


def test_a_connection_that_takes_too_long_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = page_server.SECONDS_MAX / 2  # before silence alone would be the end of it
    with serving() as server:
        slow = silent(server)
        assert ask(server, "/")[0] == 200
        # Its time is up at once; before, nobody would have cut it off.
        monkeypatch.setattr(page_server, "SECONDS_MAX", 0.0)
        with closing(slow):
            slow.settimeout(patience)
            assert slow.recv(1) == b""


def test_who_asks_and_takes_no_answer_makes_room_too() -> None:
    """The answers are larger than what the kernel keeps for who does not read."""
    with serving(take=large) as server:
        crowd = [silent(server, b"GET /metrics HTTP/1.0\r\n\r\n") for _ in range(CONNECTIONS_MAX)]
        try:
            for each in crowd:  # its answer is made, and lies there
                assert select.select([each], [], [], SECONDS_MAX)[0]
            assert ask(server, "/")[0] == 200
        finally:
            for each in crowd:
                each.close()


def test_who_goes_away_in_the_middle_harms_nobody() -> None:
    with serving() as server:
        for said in (b"", b"GET /metrics HTTP/1.0\r\n\r\n", b"\x00\xff" * 50, b"\r\n" * 3):
            silent(server, said).close()
        assert ask(server, "/")[0] == 200


async def test_a_scrape_is_answered_while_the_loop_is_stuck() -> None:
    """The page needs neither the loop nor the driver: the snapshot is there already."""
    with serving() as server:
        answered: list[int] = []
        scrape = threading.Thread(target=lambda: answered.append(ask(server, "/metrics")[0]))
        scrape.start()
        scrape.join(SECONDS_MAX)  # blocks the loop
        assert answered == [200]


def test_nobody_listens_after_closing() -> None:
    with serving() as server:
        address = server.address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.host, address.port), SECONDS_MAX)
