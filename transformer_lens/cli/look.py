"""`look`: the views of a live model in a browser, served on loopback to whoever has the address that is printed.

The address holds a secret, and the Host header has to be ours: another page, which knows neither, cannot ask the model.
"""

import hmac
import json
import secrets
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast

import typer
from typer import Argument, Option

from transformer_lens.cli.options import Loading, Model, load_bridge

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge
    from transformer_lens.viz import Picture

LOOPBACK = "127.0.0.1"
LONGEST = 100_000  # bytes of a change; a text is one
KINDS = {"forbid_expert": "expert", "ablate_head": "head", "ablate_expert": "expert"}  # routing before ablations
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def look(
    model: Model,
    text: str = Argument(..., metavar="TEXT", help="What the model reads; it can be changed in the page."),
    port: int = Option(0, min=0, max=65535, help="The port on 127.0.0.1. Default: a free one."),
    browser: bool = Option(True, "--browser/--no-browser", help="Open the page, or only print its address."),
    *,
    loading: Loading,
) -> None:
    """Look into a live model in the browser: attention, lens, predictions, experts; ablate and re-route by a click.

    Only this computer reaches the server, and only with the address printed. Ctrl-C stops it.

    [bold]Example[/]

    transformer-lens look tiny-falcon "When Mary and John went to the store, John gave a drink to"
    """
    live = LiveModel(load_bridge(model, **vars(loading)), text)
    with LookServer(live, port) as server, suppress(KeyboardInterrupt):
        typer.echo(server.address)
        if browser:
            webbrowser.open(server.address)
        server.serve_forever()


class LiveModel:
    """A model, the text it reads, and what of it is switched off. One request at a time uses it."""

    def __init__(self, bridge: "TransformerBridge", text: str) -> None:
        self.bridge, self.text = bridge, text
        self.edits: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def views(self) -> "dict[str, Callable[[TransformerBridge, str], Picture]]":
        """The pictures this model has, by the name of their tab."""
        from transformer_lens import viz

        def attention(bridge: "TransformerBridge", text: str) -> "Picture":
            _, cache = bridge.run_with_cache(text, names_filter=lambda name: name.endswith("attn.hook_pattern"))
            return viz.attention_patterns(cast(list[str], bridge.to_str_tokens(text)), cache)

        experts = {"experts": viz.routing_map} if self.bridge.cfg.num_experts else {}
        return {"attention": attention, "lens": viz.logit_lens_grid, "predictions": viz.token_predictions, **experts}

    def state(self) -> dict[str, Any]:
        """What the page shows above the view."""
        return {"text": self.text, "edits": self.edits, "views": list(self.views())}

    def page(self, view: str) -> str:
        """The page of one view, of the model as it is edited now, or the page around all views for ""."""
        from transformer_lens.viz.picture import page

        if not view:
            return page("look", {"title": "transformer-lens look", **self.state()})
        with self.lock, self.bridge.hooks(self._hooks(self.edits)):
            picture = self.views()[view](self.bridge, self.text)
        return page(picture.script, {"title": picture.title, **picture.data(), "live": True})

    def change(self, change: Any) -> dict[str, Any]:
        """Take another text, or make an edit, or undo it if it is there. Raises `ValueError` for anything else."""
        from transformer_lens.checks import in_words

        (kind, value), *more = list(change.items()) if isinstance(change, dict) and change else [("", None)]
        if more or kind not in ("text", *KINDS) or not isinstance(value, str) or not value:
            raise ValueError(f"got {in_words(change)}, expected one of text, {', '.join(KINDS)}, with a text")
        with self.lock:
            if kind == "text":
                self.text = value
            else:
                edits = [one for one in self.edits if one != (kind, value)]
                edits = edits if len(edits) < len(self.edits) else [*edits, (kind, value)]
                self._hooks(edits)
                self.edits = edits
            return self.state()

    def _hooks(self, edits: list[tuple[str, str]]) -> list[Any]:
        """The hooks of some edits. Raises `ValueError` for what this model has not, or cannot do without."""
        from transformer_lens.analysis.experts import ablate_expert, forbid_experts
        from transformer_lens.analysis.heads import ablate_heads
        from transformer_lens.asking import written_pair

        places: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
        for kind, value in edits:
            places[kind].append(written_pair(cast(Any, KINDS[kind]), value, kind))
        by_layer: dict[int, list[int]] = {}
        for layer, expert in places["forbid_expert"]:
            by_layer.setdefault(layer, []).append(expert)
        hooks: list[Any] = [hook for pair in by_layer.items() for hook in forbid_experts(self.bridge, *pair)]
        hooks += ablate_heads(self.bridge, places["ablate_head"]) if places["ablate_head"] else []
        return hooks + (ablate_expert(self.bridge, places["ablate_expert"]) if places["ablate_expert"] else [])


class LookServer(ThreadingHTTPServer):
    """A server on loopback alone, for requests that know its secret and its name."""

    daemon_threads = True

    def __init__(self, live: LiveModel, port: int = 0) -> None:
        super().__init__((LOOPBACK, port), Request)
        self.live, self.secret = live, secrets.token_urlsafe(24)
        self.host = f"{LOOPBACK}:{self.server_address[1]}"
        self.address = f"http://{self.host}/{self.secret}/"


class Request(BaseHTTPRequestHandler):
    """One request: the page, a view, or a change."""

    server: LookServer
    timeout = 60
    server_version, sys_version = "look", ""

    def do_GET(self) -> None:
        live, path = self.server.live, self._allowed()
        if path is not None and path in ("", *live.views()):
            self._answer("text/html", lambda: live.page(path))
        elif path is not None:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if (path := self._allowed()) is None:
            return
        length = self.headers.get("Content-Length", "")
        if path != "change":
            self.send_error(HTTPStatus.NOT_FOUND)
        elif self.headers.get("Origin") != f"http://{self.server.host}":
            self.send_error(HTTPStatus.FORBIDDEN, "a change comes from the page itself")
        elif self.headers.get("Content-Type") != "application/json":
            self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not length.isdecimal() or int(length) > LONGEST:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            live, body = self.server.live, self.rfile.read(int(length))
            self._answer("application/json", lambda: json.dumps(live.change(json.loads(body))))

    def _allowed(self) -> str | None:
        """The path after the secret; without the secret, or under another host name, answer with an error."""
        secret, _, path = self.path.lstrip("/").partition("/")
        if self.headers.get("Host") != self.server.host:  # a page elsewhere whose name was made to point here
            self.send_error(HTTPStatus.FORBIDDEN)
        elif not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            return path
        return None

    def _answer(self, kind: str, make: Callable[[], str]) -> None:
        """Answer with what is made, or say in a sentence what does not fit."""
        status = HTTPStatus.OK
        try:
            text = make()
        except (ValueError, TypeError, RuntimeError) as error:
            status, kind, text = HTTPStatus.BAD_REQUEST, "application/json", json.dumps({"error": str(error)})
        content = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing: a log would hold the secret."""
