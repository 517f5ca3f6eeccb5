"""The files for operations in docs/serve.md: a server obeys what they tell it, and has what they ask it for."""

from __future__ import annotations

import configparser
import contextlib
import http.client
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import ROOT, smooth
from leanvit.cli import parse
from leanvit.config import ServeConfig
from leanvit.imaging import encode_png
from leanvit.serve.run import GRACE
from serving import Running, serving

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
IMAGE = encode_png(smooth(40, 48, seed=5))
TOKEN = "0123456789abcdef"


def block(language: str, text: str) -> str:
    """The one block of the page that is in a language and holds a text."""
    (found,) = [one for one in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if text in one]
    return str(found)


@pytest.fixture(scope="module")
def server(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    with serving(f"cats={shared_bundle}", "--threads", 1, "--token-file", token, "--max-queue", 1) as running:
        yield running


def test_the_unit_starts_a_server_and_leaves_it_time_to_end(tmp_path: Path) -> None:
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block("ini", "ExecStart"))
    program, verb, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, verb) == ("leanvit", "serve")
    config = parse("serve", arguments)
    assert isinstance(config, ServeConfig)
    assert int(unit["Service"]["TimeoutStopSec"]) > config.drain + GRACE
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed. Run: apt-get install systemd")
    path = tmp_path / "leanvit.service"
    path.write_text(block("ini", "ExecStart").replace(program, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60, check=False)
    # Of a key that it does not know it only warns.
    assert (done.returncode, done.stderr) == (0, "")


def test_the_pod_s_arguments_are_the_server_s_and_its_probes_need_no_token(server: Running) -> None:
    pod = yaml.safe_load(block("yaml", "kind: Pod"))["spec"]
    (container,) = pod["containers"]
    verb, *arguments = container["args"]
    config = parse(verb, arguments)
    assert isinstance(config, ServeConfig)
    assert config.is_public
    assert str(config.threads) == container["resources"]["limits"]["cpu"]
    assert pod["terminationGracePeriodSeconds"] > config.drain + GRACE
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == config.port == container["ports"][0]["containerPort"]
        assert server.get(container[probe]["httpGet"]["path"]).code == 200
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    assert config.token_file is not None
    assert Path(config.token_file).is_relative_to(mounted["token"])
    assert config.bundles[0].partition("=")[2].startswith(mounted["bundles"])


def test_the_rules_of_prometheus_ask_for_metrics_that_are_there(server: Running) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert server.predict("cats", IMAGE, **headers).code == 200
    assert server.get("/metrics").code == 401
    samples = server.get("/metrics", **headers).body.decode().splitlines()
    rules = [rule for group in yaml.safe_load(block("yaml", "alert"))["groups"] for rule in group["rules"]]
    selectors = [found for rule in rules for found in re.findall(r"(\w+)\{([^}]*)\}", rule["expr"])]
    assert len(selectors) == len(rules) == 4
    for name, matchers in selectors:
        wanted = []
        for label, sign, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers):
            wanted.append(f'{label}="{value}"' if sign == "=" else f'{label}="')
        found = [one for one in samples if one.startswith(f"{name}{{") and all(text in one for text in wanted)]
        assert found, (name, matchers)
    # What has not happened yet is 0 and not missing: the first event is an increase.
    for counter in (
        'leanvit_swaps_total{model="cats",outcome="kept"} 0.0',
        'leanvit_refused_total{reason="queue"} 0.0',
    ):
        assert counter in samples


NGINX = block("nginx", "proxy_pass")


def test_nginx_takes_the_bodies_that_the_server_takes_and_leaves_connections_first() -> None:
    config = ServeConfig(bundles=["cats"])
    (most,) = re.findall(r"client_max_body_size (\d+)m;", NGINX)
    assert int(most) * 2**20 == config.max_body
    (idle,) = re.findall(r"keepalive_timeout (\d+)s;", NGINX)
    assert int(idle) < config.timeout
    assert f"server 127.0.0.1:{config.port};" in NGINX


@contextlib.contextmanager
def behind_nginx(server: Running, folder: Path) -> Iterator[int]:
    """nginx with the page's configuration, but on a free port and without TLS, in front of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = re.sub(r"\n *ssl_certificate[^\n]*", "", NGINX.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};"))
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    start = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
    (folder / "nginx.conf").write_text(f"{start}http {{\naccess_log off;\n{places}{text}}}\n")
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def ask(port: int, body: Any, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    named = {"Authorization": f"Bearer {TOKEN}"} | {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request("POST", "/v1/models/cats:predict", body, named, encode_chunked=not isinstance(body, bytes))
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed. Run: apt-get install nginx-light")
def test_a_server_behind_nginx_answers_as_without_it(server: Running, tmp_path: Path) -> None:
    with behind_nginx(server, tmp_path) as port:
        code, _, body = ask(port, IMAGE)
        assert code == 200
        assert b'"predictions"' in body
        pieces = iter([IMAGE[first : first + 500] for first in range(0, len(IMAGE), 500)])
        assert ask(port, pieces)[0] == 200
        code, headers, body = ask(port, IMAGE, X_Timeout_Ms="0")
        assert (code, headers["Retry-After"]) == (429, "1")
        assert b"deadline" in body
        assert ask(port, IMAGE, Authorization="Bearer wrong")[0] == 401
        # As large as the server takes, which then says that it is no image; one byte more is refused by nginx.
        assert ask(port, bytes(16 * 2**20))[0] == 400
        assert ask(port, bytes(16 * 2**20 + 1))[0] == 413
