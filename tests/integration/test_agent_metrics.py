"""A running agent's pages: the options reach the door, and a file that is wrong stops the start."""

import base64
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import bcrypt
import pytest
from tests.support.daemons import Stage
from tests.support.pages import FETCH_SECONDS_MAX
from tests.support.waiting import until

TLS = Path(__file__).parents[1] / "support" / "tls"
OPTIONS = f"""
metrics:
  tls_cert: {TLS / "server.pem"}
  tls_key: {TLS / "server.key"}
  tls_client_ca: {TLS / "ca.pem"}
  basic_auth_file: {{users}}
  dcgm_hostname_label: hostname
"""


def fetch(address: str, path: str, authorization: str) -> str:
    """Return the page as a scraper with a certificate gets it."""
    context = ssl.create_default_context(cafile=TLS / "ca.pem")
    context.load_cert_chain(TLS / "scraper.pem", TLS / "scraper.key")
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    request = urllib.request.Request(
        f"https://{address}{path}", headers={"Authorization": authorization}
    )
    with opener.open(request, timeout=FETCH_SECONDS_MAX) as answer:
        text: str = answer.read().decode()
    return text


async def test_a_door_with_a_certificate_and_users(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"prometheus:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    options = tmp_path / "agent.yaml"
    options.write_text(OPTIONS.format(users=users))
    known = "Basic " + base64.b64encode(b"prometheus:secret").decode()
    async with Stage(tmp_path) as stage:
        await stage.aggregator().start()
        told = await stage.agent("node-a", "2xT4", "--config", str(options)).start()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(told["metrics"], "/metrics", "Basic " + base64.b64encode(b"x:y").decode())

        async def is_sampling() -> bool:
            return 'stoker_gpu_up{node="node-a",gpu="1"' in fetch(
                told["metrics"], "/metrics", known
            )

        await until("the agent to sample", is_sampling)
        assert ',hostname="node-a",' in fetch(told["metrics"], "/metrics/dcgm", known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{tls_cert: /absent, tls_key: /absent}", "metrics.tls_cert: /absent: No such file"),
        ("{basic_auth_file: /absent}", "metrics.basic_auth_file: /absent: No such file"),
        ("{tls_cert: /absent}", "metrics.tls_cert: /absent is of no use without metrics.tls_key"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_start(
    tmp_path: Path, options: str, message: str
) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(
        f"metrics: {options}\ndata_dir: {tmp_path / 'data'}\nsimulate: [T4]\n"
        "aggregator: ['127.0.0.1:1']\n"
    )
    command = [sys.executable, "-m", "stoker.agent", "--config", str(file)]
    command += ["--metrics-listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"stoker-agent: {message}")
    assert done.stderr.count("\n") == 1
