"""What a client of remote blocks can set, beside the model's own config: peers, time limits, prompts, the LM head.

The fields are declared once, here; `check_settings` says in a sentence what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformer_lens.checks import is_one_of


@dataclass(kw_only=True, repr=False, eq=False)
class ClientSettings:
    """How a client finds and uses servers. Times are in seconds. None of this is written into a saved config."""

    initial_peers: Sequence[str] = ()
    """Addresses of peers to start from. Empty: none; never a public swarm."""
    dht_prefix: str | None = None
    """The name under which servers announce this model's blocks; `None`: from the model's name."""
    daemon_startup_timeout: float = 60
    show_route: bool | str = "inference"
    """When to log which servers were chosen: always, never, or in inference alone."""
    allowed_servers: Sequence[str] | None = None
    blocked_servers: Sequence[str] | None = None
    connect_timeout: float = 5
    request_timeout: float = 180
    update_period: float = 60
    max_retries: int = 5
    min_backoff: float = 1
    max_backoff: float = 60
    ban_timeout: float = 15
    active_adapter: str | None = None
    max_pinged: int = 3
    ping_timeout: float = 2


@dataclass(kw_only=True, repr=False, eq=False)
class PromptSettings:
    """Trained prompts in front of the text."""

    pre_seq_len: int = 0
    tuning_mode: str | None = None


@dataclass(kw_only=True, repr=False, eq=False)
class HeadSettings:
    """How the LM head is computed on the client."""

    use_chunked_forward: bool | str = "auto"
    chunked_forward_step: int = 16384


CLIENT_SETTINGS: tuple[str, ...] = tuple(field.name for field in fields(ClientSettings))

TIMES: tuple[str, ...] = tuple(field.name for field in fields(ClientSettings) if field.type == "float")
COUNTS = {"max_retries": 0, "max_pinged": 1, "pre_seq_len": 0, "chunked_forward_step": 1}
"""Whole numbers, and the least each may be."""
LISTS = {"initial_peers": False, "allowed_servers": True, "blocked_servers": True}
"""Lists of strings, and whether `None` may stand for "all" or "none"."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "show_route": (True, False, "inference"),
    "tuning_mode": (None, "ptune", "deep_ptune"),
    "use_chunked_forward": (True, False, "auto"),
}


def check_prefix(prefix: Any) -> None:
    """Raise `ValueError` for a prefix that cannot be part of a block's uid (`prefix.layer`).

    >>> check_prefix("falcon-180B")
    """
    if prefix is None:
        return
    if not isinstance(prefix, str):
        raise TypeError(f"dht_prefix: got {type(prefix).__name__}, expected a str or None")
    if not prefix or "." in prefix or any(letter.isspace() for letter in prefix):
        raise ValueError(
            f"dht_prefix: got {prefix!r}, expected a name without '.' and blanks, which separate the uids of blocks; "
            "write '-' instead"
        )


def check_settings(config: Any) -> None:
    """Raise `ValueError` or `TypeError` for the first setting that does not fit.

    >>> check_settings(ClientSettings(max_retries=-1))
    Traceback (most recent call last):
    ...
    ValueError: max_retries: got -1, expected a whole number, at least 0
    """
    check_prefix(config.dht_prefix)
    here = vars(config)
    for name in TIMES:
        number = isinstance(here[name], (int, float)) and not isinstance(here[name], bool)
        if not number or not 0 < here[name] < float("inf"):
            raise ValueError(f"{name}: got {here[name]!r}, expected a time in seconds, above 0 and finite")
    for name, least in COUNTS.items():
        if name in here and (type(here[name]) is not int or here[name] < least):
            raise ValueError(f"{name}: got {here[name]!r}, expected a whole number, at least {least}")
    for name, may_miss in LISTS.items():
        if here[name] is None and may_miss:
            continue
        several = isinstance(here[name], Sequence) and not isinstance(here[name], str)
        if not several or not all(isinstance(one, str) and one for one in here[name]):
            raise TypeError(f"{name}: got {here[name]!r}, expected a list of strings{' or None' if may_miss else ''}")
    for name, allowed in CHOICES.items():
        if name in here and not is_one_of(here[name], allowed):
            raise ValueError(f"{name}: got {here[name]!r}, expected one of {', '.join(map(repr, allowed))}")
    if config.min_backoff > config.max_backoff:
        raise ValueError(f"min_backoff: got {config.min_backoff}, expected at most max_backoff, {config.max_backoff}")
    if here.get("tuning_mode") is not None and not here["pre_seq_len"]:
        raise ValueError(f"tuning_mode={here['tuning_mode']!r} trains pre_seq_len prompts, and pre_seq_len is 0")
