"""One libp2p peer in this process: hivemind's daemon as a child process, and a thread that talks to it.

Only unary calls, which fail at once when the other side dies. Nothing leaves the given addresses: no relays, no NAT
mapping, no public peers. Needs the extra `[swarm]`.
"""

import asyncio
import atexit
import ipaddress
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformer_lens.checks import needed
from transformer_lens.distributed.network.frames import FrameError, FrameRefused, conversation, ping, pong
from transformer_lens.distributed.network.records import PEER, Table, bounded, validator
from transformer_lens.distributed.protocol.messages import Limits, SpanError, SpanUnreachable

logger = logging.getLogger(__name__)

HANDLER = "transformer_lens.span.1"  # the call's name in libp2p, whose number changes with incompatible versions
MISSING = "servers on other machines need hivemind: pip install 'transformer-lens-bridge[swarm]'"
GRACE = 3.0  # seconds for the daemon to end before it is killed
AFTER_FAILURE = 0.2  # seconds for asyncio to notice that a daemon failed to start; without them it complains
ADDRESS = re.compile(rf"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/(tcp|udp)/\d+(/[\w-]+)*/p2p/{PEER.pattern}")
Result = TypeVar("Result")
Handler = Callable[[bytes, str], Awaitable[bytes]]


def need_engine() -> Any:
    """The network library. Raises `ImportError`, saying what to install, if it is missing."""
    for part in ("dht.node", "dht.storage", "dht.validation", "p2p.p2p_daemon_bindings.utils"):
        needed(f"hivemind.{part}", MISSING)
    engine = needed("hivemind", MISSING)
    protocol = engine.dht.protocol.DHTProtocol
    if protocol.serializer is engine.utils.MSGPackSerializer:  # every table of this process reads with it
        protocol.serializer = bounded(protocol.serializer, engine.dht.storage.DictionaryDHTValue)
    return engine


def address_of(host: str, port: int) -> str:
    """The libp2p address "/ip4/127.0.0.1/tcp/0" of an IP address and a port. Raises `ValueError` for any other host."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError as error:
        raise ValueError(f"host: got {host!r}, expected an IP address such as 127.0.0.1") from error
    return f"/ip{found.version}/{found}/tcp/{port}"


class Node:
    """A peer that calls others and stores records with them; with `listen`, others can call it.

    >>> node = Node(listen="/ip4/127.0.0.1/tcp/0")  # doctest: +SKIP
    >>> other = Node(node.addresses)  # doctest: +SKIP

    `initial_peers` are addresses of peers to join, or empty for the first peer. `identity` is a key file, made if
    missing, which keeps the peer id the same. `allow` are the peers whose records it keeps; `None` means all. Raises
    `SpanUnreachable` if no initial peer answers, and `RuntimeError` if the daemon does not start.
    """

    def __init__(
        self,
        initial_peers: Sequence[str] = (),
        *,
        listen: str | None = None,
        identity: str | os.PathLike[str] | None = None,
        allow: Collection[str] | None = None,
        startup_timeout: float = 60,
    ) -> None:
        for address in initial_peers:
            if not ADDRESS.fullmatch(address):
                raise ValueError(
                    f"initial_peers: got {address!r}, expected an address that a server prints, such as "
                    "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooW..."
                )
        need_engine()
        self.initial_peers = list(initial_peers)
        self.peer = ""
        self.addresses: list[str] = []
        self.dead = ""
        """Why nothing can be called any more; empty while it works."""
        self.ended = threading.Event()
        """Set when the daemon is gone, for whatever reason."""
        self._pid = os.getpid()
        self._closing = False
        self._identity: bytes | None = None
        self._p2p: Any = None
        self._dht: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="libp2p", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        with ExitStack() as undo, tempfile.TemporaryDirectory(prefix="identity-") as folder:
            undo.callback(self.close)
            if identity is None and listen:  # what it announces is signed
                identity = os.path.join(folder, "key")
            if identity is not None:
                make_identity(identity)
                self._identity = Path(identity).read_bytes()
            self.wait(self._start(listen, identity, allow, startup_timeout))
            undo.pop_all()

    def _run(self) -> None:
        # The daemon inherits this: Ctrl-C is for this process alone, which then shuts down in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _start(self, listen: str | None, identity: Any, allow: Any, startup_timeout: float) -> None:
        engine = need_engine()
        failures: tuple[type[Exception], ...] = (RuntimeError, *_engine_errors(engine))
        here = {"host_maddrs": [listen]} if listen else {"host_maddrs": [], "no_listen": True}
        try:
            self._p2p = await engine.p2p.P2P.create(
                initial_peers=self.initial_peers or None,
                identity_path=None if identity is None else os.fspath(identity),
                dht_mode="server" if listen else "client",
                startup_timeout=startup_timeout,
                **dict.fromkeys(("auto_nat", "nat_port_map", "use_relay", "use_auto_relay", "use_ipfs"), False),
                check_if_identity_free=False,  # it would start a second daemon, which maps ports
                **here,
            )
        except failures as error:
            await asyncio.sleep(AFTER_FAILURE)
            raise self._not_started(error) from error
        self.peer = self._p2p.peer_id.to_base58()
        self._ended = self._loop.create_future()
        self._keep(self._watch())
        kept = Table(None if allow is None else {*allow, self.peer}) if listen else None
        try:
            self._dht = await engine.dht.node.DHTNode.create(
                p2p=self._p2p,
                initial_peers=self.initial_peers or None,
                client_mode=listen is None,
                # Announcements are fetched anew each time, or a server that joins would be seen late.
                cache_locally=False,
                cache_nearest=0,
                record_validator=validator(engine.dht.validation.RecordValidatorBase, self._identity, kept),
            )
        except failures as error:
            raise self._not_started(error) from error
        if listen:
            self.addresses = [str(address) for address in await self._p2p.get_visible_maddrs()]

    def _not_started(self, error: Exception) -> Exception:
        if self.initial_peers:
            return SpanUnreachable(f"none of the initial peers {', '.join(self.initial_peers)} answered: {error}")
        return RuntimeError(f"the libp2p daemon did not start: {error}")

    async def _watch(self) -> None:
        code = await self._p2p._child.wait()  # hivemind itself does not look; a pending call would wait for ever
        if not self._closing:
            self.dead = f"the libp2p daemon of this process ended with code {code}"
            logger.error("%s; no server can be reached until a new connection is made", self.dead)
        self._ended.set_result(None)
        self.ended.set()

    def close(self) -> None:
        if self._closing or os.getpid() != self._pid:
            return
        self._closing = True
        self.dead = self.dead or "this connection was closed"
        try:
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(2 * GRACE)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(GRACE)
            atexit.unregister(self.close)
            self.ended.set()

    async def _stop(self) -> None:
        if self._p2p is not None:
            child = self._p2p._child
            if self._dht is not None:
                self._dht.is_alive = False
            try:
                await asyncio.wait_for(self._p2p.shutdown(), GRACE)
            except TimeoutError:
                child.kill()
                await child.wait()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def begin(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start work in the node's thread."""
        if self._closing:
            work.close()
            raise SpanUnreachable(self.dead)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = self.begin(work)
        try:
            return future.result()
        except CancelledError as error:
            raise SpanUnreachable(self.dead or "the call was cancelled") from error
        finally:
            future.cancel()  # after Ctrl-C nobody waits for it any more; one that is done stays so
            del future  # its error holds this frame, and so the text whose sessions are closed once it is gone

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that is referenced until it is done."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def call(self, peer: str, message: bytes, seconds: float, most: int = Limits().answer) -> bytes:
        """Send a peer a message of any size and return its answer.

        Raises `SpanUnreachable` if none comes within `seconds`, `SpanError` with the peer's words if it refuses.
        """
        return self.wait(self._converse(peer, message, time.monotonic() + seconds, seconds, most))

    def ping(self, peer: str, seconds: float) -> tuple[float, bytes]:
        """The round-trip time of a small message, and the peer's description of itself."""
        return self.wait(self.pinged(peer, seconds))

    async def pinged(self, peer: str, seconds: float) -> tuple[float, bytes]:
        begin = time.perf_counter()
        with _errors_of(peer):
            reply = await self._once(peer, ping(), seconds, seconds)
            return time.perf_counter() - begin, pong(reply)

    async def _converse(self, peer: str, message: bytes, until: float, seconds: float, most: int) -> bytes:
        talk = conversation(message, seconds, most)
        frame = next(talk)
        with _errors_of(peer):
            while True:
                try:
                    reply = await self._once(peer, frame, until - time.monotonic(), seconds)
                except ConnectionError as error:  # once more: the server does not compute a repeated call again
                    logger.info("peer %s: %s; trying once more", peer, error)
                    reply = await self._once(peer, frame, until - time.monotonic(), seconds)
                try:
                    frame = talk.send(reply)
                except StopIteration as done:
                    return bytes(done.value)

    async def _once(self, peer: str, frame: bytes, left: float, seconds: float) -> bytes:
        """One unary call. Raises `ConnectionError` if it breaks, `SpanUnreachable` if time is up."""
        if self.dead:
            raise SpanUnreachable(self.dead)
        engine, value = need_engine(), needed("google.protobuf.wrappers_pb2", MISSING).BytesValue
        to = engine.p2p.PeerID.from_base58(peer)
        work = self._keep(self._p2p.call_protobuf_handler(to, HANDLER, value(value=frame), value))
        try:
            await asyncio.wait({work, self._ended}, timeout=max(left, 0.001), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return bytes(work.result().value)
        except _engine_errors(engine) as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        finally:
            work.cancel()
        if self.dead:
            raise SpanUnreachable(self.dead)
        raise SpanUnreachable(f"peer {peer}: no answer within {seconds:g} s")

    def serve(self, handler: Handler) -> None:
        """Answer pieces of calls with `handler(piece, peer id of the caller)`."""
        value = needed("google.protobuf.wrappers_pb2", MISSING).BytesValue

        async def answer(request: Any, context: Any) -> Any:
            return value(value=await handler(request.value, context.remote_id.to_base58()))

        self.wait(self._p2p.add_protobuf_handler(HANDLER, answer, value))

    def store(self, uids: Iterable[str], value: Any, seconds: float) -> bool:
        """Store a value under each name and this peer's id for some seconds; returns whether any peer did."""
        keys = list(uids)
        values, ends, peers = ([one] * len(keys) for one in (value, time.time() + seconds, self.peer))
        stored: Mapping[Any, bool] = self.wait(self._dht.store_many(keys, values, ends, subkeys=peers))
        return all(stored.values())

    async def found(self, uids: Sequence[str]) -> dict[str, dict[Any, Any]]:
        """What peers stored under these names: name -> peer id -> (value, expiry)."""
        got = await self._dht.get_many(list(uids), sufficient_expiration_time=float("inf"))
        rows = {uid: entry.value for uid, entry in got.items() if entry is not None}
        return {uid: dict(row.items()) for uid, row in rows.items() if isinstance(row, Mapping)}


@contextmanager
def _errors_of(peer: str) -> Iterator[None]:
    """Translate a failed call into the caller's errors."""
    try:
        yield
    except (ConnectionError, FrameError) as error:
        raise SpanUnreachable(f"peer {peer}: {error}") from error
    except FrameRefused as error:
        raise SpanError(f"peer {peer}: {error}", {"retry": error.retry}) from error


def make_identity(path: str | os.PathLike[str]) -> None:
    """Write a new key to this file, readable by its owner only; an existing file stays."""
    if os.path.exists(path):
        return
    engine = need_engine()
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    engine.p2p.P2P.generate_identity(os.fspath(path))


def peer_of(identity: str | os.PathLike[str]) -> str:
    """The peer id of an identity file, made if missing: what a server's `--allow` takes.

    >>> peer_of("me.key")  # doctest: +SKIP
    'QmNiBr4s9Cr9vNE2yLcbVLcMVoLC4jUcXgQuSKuzfHyyyV'
    """
    make_identity(identity)
    return str(need_engine().p2p.PeerID.from_identity(Path(identity).read_bytes()).to_base58())


def _engine_errors(engine: Any) -> tuple[type[Exception], ...]:
    bindings = engine.p2p.p2p_daemon_bindings.utils
    return (bindings.P2PDaemonError, bindings.P2PHandlerError, OSError, EOFError)
