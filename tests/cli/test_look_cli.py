"""`look`: who may ask, what a change does to the model, and how it ends."""

import http.client
import json
import shutil
import signal
import socket
import threading

import pytest
import torch

from tests.cli.test_running import start
from transformer_lens import TransformerBridge
from transformer_lens.cli.look import LONGEST, LiveModel, LookServer

TEXT = "When Mary and John went to the store, John gave a drink to"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.fixture(scope="module")
def mixtral() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-mixtral")


@pytest.fixture
def serve():
    running = []

    def begin(bridge: TransformerBridge) -> LookServer:
        server = LookServer(LiveModel(bridge, TEXT))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running.append((server, thread))
        return server

    yield begin
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server: LookServer, path: str, method: str = "GET", body: str | None = None, **headers: str):
    """The status, the headers and the text of an answer; `Host` and `Origin` are right unless given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    given = {"Host": server.host, "Origin": f"http://{server.host}", **headers}
    connection.request(method, path, body, {name: value for name, value in given.items() if value})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    connection.close()
    return found


def change(server: LookServer, **changes):
    status, _, text = ask(server, f"/{server.secret}/change", "POST", json.dumps(changes), **JSON)
    return status, json.loads(text)


def in_page(text: str):
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_nobody_gets_in_without_the_secret_and_the_name(serve, falcon):
    server = serve(falcon)
    port = server.server_address[1]
    assert server.server_address[0] == "127.0.0.1" and len(server.secret) >= 32
    for path in ("/", "/nonsense/", f"/{server.secret[:-1]}/", f"/{server.secret}x/attention", "//", "/%00/"):
        status, headers, text = ask(server, path)
        assert status == 404 and server.secret not in text + str(headers)
    for host in ("evil.example", f"evil.example:{port}", f"localhost:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
        assert ask(server, f"/{server.secret}/", Host=host)[0] == 403
        assert ask(server, f"/{server.secret}/change", "POST", "{}", Host=host, **JSON)[0] == 403
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        assert ask(server, f"/{server.secret}/", method)[0] == 501
    assert ask(server, f"/{server.secret}/nonsense")[0] == 404
    assert ask(server, f"/{server.secret}/attention", "POST", "{}", **JSON)[0] == 404
    # The machine's other addresses do not answer.
    for other in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
        if not other.startswith("127."):
            with pytest.raises(OSError), socket.create_connection((other, port), timeout=2):
                pass


def test_a_change_comes_from_the_page_as_json_of_a_sensible_size(serve, falcon):
    server = serve(falcon)
    path, body = f"/{server.secret}/change", json.dumps({"text": "Mary"})
    for origin in ("", "null", "http://evil.example", f"https://{server.host}"):
        assert ask(server, path, "POST", body, Origin=origin, **JSON)[0] == 403
    assert ask(server, path, "POST", body)[0] == 415
    assert ask(server, path, "POST", body, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, path, "POST", "x" * (LONGEST + 1), **JSON)[0] == 413
    for wrong in (
        "{",
        "[]",
        "5",
        "{}",
        '{"text": ""}',
        '{"text": 5}',
        '{"nonsense": "L0H0"}',
        '{"text": "a", "b": "c"}',
    ):
        status, _, text = ask(server, path, "POST", wrong, **JSON)
        assert status == 400 and json.loads(text)["error"]
    for wrong in ({"ablate_head": "L9H0"}, {"ablate_head": "nonsense"}, {"ablate_expert": "L0E0"}):
        assert change(server, **wrong)[0] == 400
    assert server.live.state() == {"text": TEXT, "edits": [], "views": ["attention", "lens", "predictions"]}


def test_pages_load_nothing_and_are_framed_by_nobody(serve, falcon):
    server = serve(falcon)
    for path in ("", "attention", "lens", "predictions"):
        status, headers, text = ask(server, f"/{server.secret}/{path}")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'self'" in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
        assert server.secret not in text


def test_a_head_is_ablated_by_a_change_and_comes_back_by_the_same(serve, falcon):
    server = serve(falcon)
    plain = in_page(ask(server, f"/{server.secret}/lens")[2])
    assert plain["live"] and plain["panels"][0]["texts"][-1][-1] == " Mary"
    for head in ("L3H2", "3.0", "L3H1", "L3H3"):
        status, state = change(server, ablate_head=head)
    assert status == 200 and state["edits"][0] == ["ablate_head", "L3H2"]
    edited = in_page(ask(server, f"/{server.secret}/lens")[2])["panels"][0]
    with torch.no_grad():
        expected = falcon.run_with_hooks(TEXT, fwd_hooks=[("blocks.3.attn.hook_z", lambda z, hook: z * 0)])[0, -1]
    assert edited["texts"][-1][-1] == falcon.to_string([int(expected.argmax())]) != " Mary"
    assert edited["values"][-1][-1] == pytest.approx(float(expected.softmax(-1).max()), abs=1e-4)
    for head in ("L3H2", "3.0", "L3H1", "L3H3"):
        state = change(server, ablate_head=head)[1]
    assert state["edits"] == [] and in_page(ask(server, f"/{server.secret}/lens")[2]) == plain
    assert change(server, text="Mary and")[1]["text"] == "Mary and"
    assert len(in_page(ask(server, f"/{server.secret}/attention")[2])["tokens"]) == len(
        falcon.to_str_tokens("Mary and")
    )


def test_tokens_are_routed_away_from_an_expert(serve, mixtral):
    server = serve(mixtral)
    plain = in_page(ask(server, f"/{server.secret}/experts")[2])
    gone = plain["layers"][0]["indices"][2][0]
    assert change(server, forbid_expert=f"L0E{gone}")[0] == 200
    routed = in_page(ask(server, f"/{server.secret}/experts")[2])
    assert not any(gone in row for row in routed["layers"][0]["indices"])
    assert change(server, ablate_expert="L1E0")[0] == 200
    for number, expert in enumerate(one for one in range(4) if one != gone):
        status, answer = change(server, forbid_expert=f"L0E{expert}")
        assert status == (200 if number == 0 else 400)  # the model chooses two for each token
    assert "leaves 1 of 4" in answer["error"]


def test_control_c_ends_it():
    process = start("look", "tiny-falcon", TEXT, "--no-browser")
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:") and address.endswith("/")
    host, secret = address.removeprefix("http://").rstrip("/").split("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/{secret}/lens")
    assert " Mary" in connection.getresponse().read().decode()
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=60)
    assert (process.returncode, said, complaints) == (0, "", "")
    with pytest.raises(OSError):
        connection.request("GET", f"/{secret}/")


@pytest.mark.browser
def test_clicking_in_a_browser_ablates_and_reroutes(serve, mixtral):
    from playwright.sync_api import sync_playwright

    server = serve(mixtral)
    complaints: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 390, "height": 844})
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.address)
        view = page.frame_locator("iframe")
        view.get_by_role("button", name="L1H2").click()
        view.get_by_role("button", name="ablate this head").click()
        undo = page.get_by_role("button", name="without head L1H2")
        undo.wait_for()
        assert server.live.edits == [("ablate_head", "L1H2")]
        undo.click()
        undo.wait_for(state="detached")
        page.get_by_role("button", name="experts", exact=True).click()
        view.get_by_role("button", name="expert 2", exact=True).click()
        view.get_by_role("button", name="route away from it").click()
        page.get_by_role("button", name="routed away from L0E2").wait_for()
        view.get_by_role("button", name="expert 2", exact=True).get_by_text("0 of").wait_for()
        page.get_by_label("text").fill("Mary and John")
        page.get_by_role("button", name="read this text").click()
        page.wait_for_function("document.querySelector('[role=status]').textContent === ''")
        assert server.live.text == "Mary and John"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        chromium.close()
    assert complaints == []
