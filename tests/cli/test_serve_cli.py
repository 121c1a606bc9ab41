"""`serve` and `status` without a network: what is said of options that do not fit. tests/swarm runs the rest."""

from __future__ import annotations

import sys

import pytest
import typer
from typer.testing import CliRunner

from transformer_lens.cli.app import app
from transformer_lens.cli.serve import show, span_of, warn_if_open

PEER = "12D3KooWSDoCAofrZc2bysLM1WbuvujxsPhdtRtyU1vTJvwpagEQ"


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    "options",
    [
        ["--blocks", "2:2"],
        ["--blocks", "2"],
        ["--blocks", "0:2", "--port", "65536"],
        ["--blocks", "0:2", "--update-period", "0"],
        ["--blocks", "0:2", "--message-bytes", "0"],
        ["--blocks", "0:2", "--session-seconds", "0"],
        ["--blocks", "0:2", "--drain-seconds", "-1"],
        ["--blocks", "0:2", "--threads", "0"],
        ["--blocks", "0:2", "--dtype", "float33"],
        ["--blocks", "0:2", "--device", "nowhere"],
    ],
)
def test_what_is_no_such_option(options: list[str]) -> None:
    found = run("serve", "tiny-falcon", *options)
    assert found.exit_code == 2
    assert f"Invalid value for '{options[-2]}'" in found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--blocks", "0:9"], "blocks: got range(0, 9), expected some of range(0, 4), one after the other"),
        (["--blocks", "0:2", "--host", "here"], "host: got 'here', expected an IP address such as 127.0.0.1"),
        (["--blocks", "0:2", "--update-period", "inf"], "update_period: got inf, expected a number above 0 and finite"),
        (["--blocks", "0:2", "--device", "cuda:7"], "cuda:7"),
        (["--blocks", "0:2", "--allow", "me"], "allow: got 'me', expected a peer id such as 12D3KooW..."),
        (["--blocks", "0:2", "--prefix", "a.b"], "dht_prefix: got 'a.b'"),
    ],
)
def test_options_that_do_not_fit(options: list[str], error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer_lens.distributed.network.node.need_engine", lambda: None)  # maybe missing
    found = run("serve", "tiny-falcon", *options)
    assert found.exit_code == 1
    assert error in found.stderr
    assert found.stdout == ""


def test_a_missing_network_library_is_said_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "hivemind"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hivemind", None)
    found = run("serve", "tiny-falcon", "--blocks", "0:2")
    assert found.exit_code == 1
    assert (
        "error: servers on other machines need hivemind: pip install 'transformer-lens-bridge[swarm]'" in found.stderr
    )
    assert "tensors" not in found.stderr + caplog.text


def test_status_without_peers() -> None:
    found = run("status", "tiny-falcon")
    assert found.exit_code == 1
    assert "initial_peers: got none, expected addresses of servers" in found.stderr


def test_spans() -> None:
    assert span_of(" 3 : 10") == range(3, 10)
    for text in ("", "1:2:3", "-1:2", "a:b", "0:100000000", "1-2"):
        with pytest.raises(typer.BadParameter, match="expected a first block and an end"):
            span_of(text)


def test_only_a_host_that_others_reach_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for host, allow in (("127.0.0.1", None), ("::1", None), ("10.0.0.5", [PEER])):
        warn_if_open(host, allow)
    assert capsys.readouterr().err == ""
    for host in ("10.0.0.5", "0.0.0.0", "::"):
        warn_if_open(host, [])
        assert f"warning: {host} can be reached from other machines" in capsys.readouterr().err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "peer": PEER,
        "blocks": [0, 2],
        "state": "no answer",
        "load": 1.0,
        "sessions": None,
        "kv_bytes": 1234567,
        "kv_bytes_free": None,
        "latency": None,
        "seconds_per_block": 0.0021,
        "version": "0.1.0",
    }
    show({"model": "m", "n_layers": 4, "servers": [row], "missing": [2, 3]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].rstrip() == "m: 1 servers of 4 blocks"
    assert ["0:2", "no", "answer", "1", "1,234,567", "2.1", "0.1.0", PEER] in [line.split() for line in lines]
    assert lines[-1] == "nobody serves the blocks 2, 3"
