"""Code and pickles in a checkpoint, which loading refuses to run or read unless asked for by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import cached_file, has_file

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
"""Keywords that say where a file comes from; config, weights and tokenizer share them."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


class Source:
    """A hub name or a directory, and what is in it."""

    def __init__(self, name: str | Path, *, revision: str | None = None, **options: Any) -> None:
        self.name = str(name)
        self.hub = {"revision": revision, **{key: options[key] for key in HUB_OPTIONS if key in options}}

    def has(self, filename: str) -> bool:
        """Whether the file is there; nothing is downloaded."""
        options = {key: value for key, value in self.hub.items() if key not in ("subfolder", "force_download")}
        folder = self.hub.get("subfolder")
        return bool(has_file(self.name, f"{folder}/{filename}" if folder else filename, **options))

    def base(self) -> Source:
        """The base model of an adapter alone; otherwise this source. Raises `OSError` for a path with nothing there."""
        here = Path(self.name)
        if not (here.is_dir() or here.is_file()) and (here.is_absolute() or self.name.startswith(".")):
            raise OSError(f"{self.name}: there is no such directory or file")
        if here.is_file() or self._small_file("config.json") or not self._small_file(ADAPTER_CONFIG):
            return self
        below = self.read_json(ADAPTER_CONFIG).get("base_model_name_or_path")
        if not below:
            raise ValueError(
                f"{self.name}: its {ADAPTER_CONFIG} names no base_model_name_or_path; load the model it was trained "
                "on, and put the adapter on that"
            )
        return Source(below, **self.hub)

    def _small_file(self, filename: str) -> str | None:
        """The local path of a file, downloaded if necessary; `None` if the source has none."""
        found: str | None = cached_file(
            self.name,
            filename,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **self.hub,
        )
        return found

    def read_json(self, filename: str) -> Any:
        return json.loads(Path(cached_file(self.name, filename, **self.hub)).read_text(encoding="utf-8"))

    def config(self, trust_remote_code: bool = False) -> Any:
        """The config, read with transformers' own class. Raises `ValueError` if only code in the repository can."""
        self._need_within_reach()
        if not trust_remote_code:
            written, _ = PreTrainedConfig.get_config_dict(self.name, **self.hub)
            if not isinstance(written, dict):
                raise ValueError(f"{self.name}: its config is a {type(written).__name__}, expected a JSON object")
            code = (written.get("auto_map") or {}).get("AutoConfig")
            if code and written.get("model_type") not in CONFIG_MAPPING:
                raise ValueError(
                    f"{self.name}: its config is read by code in its repository ({code}), which is not run unless "
                    "asked for; read that code, and if you trust it pass trust_remote_code=True"
                )
        return AutoConfig.from_pretrained(self.name, trust_remote_code=trust_remote_code, **self.hub)

    def _need_within_reach(self) -> None:
        """Raise `OSError` for a name that needs a network where none is to be used."""
        if constants.HF_HUB_OFFLINE and not Path(self.name).exists() and not self._small_file("config.json"):
            raise OSError(
                f"{self.name} is on this machine neither as a directory nor in Hugging Face's cache, and "
                "HF_HUB_OFFLINE=1 keeps off the network; unset it to download, or pass a directory"
            )

    def pickles(self, config: Any, variant: str | None = None) -> list[str]:
        """The pickled files that transformers would read for this config; empty where all are safetensors."""
        found = []
        chosen = getattr(config, "transformers_weights", None) or self._weights(variant)
        if chosen is not None and chosen.endswith(".json"):
            shards = set(self.read_json(chosen)["weight_map"].values())
            found += sorted(shard for shard in shards if not shard.endswith(".safetensors"))
        elif chosen is not None and not chosen.endswith(".safetensors"):
            found.append(chosen)
        if self._small_file(ADAPTER_CONFIG) and not self.has(ADAPTER_WEIGHTS) and self.has(ADAPTER_PICKLE):
            found.append(ADAPTER_PICKLE)
        return found

    def _weights(self, variant: str | None) -> str | None:
        """The file with the weights, or with their list, that transformers takes first."""
        middle = f".{variant}" if variant else ""
        names = [f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"]
        names += [f"pytorch_model{middle}.bin", f"pytorch_model.bin.index{middle}.json"]
        return next((name for name in names if self.has(name)), None)


def refuse_pickles(source: Source, config: Any, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` if loading with these keywords would read a pickle."""
    for keyword in ("use_safetensors", "weights_only"):
        if options.get(keyword) is False:
            raise ValueError(
                f"{keyword}=False asks for pickled weights, and a pickle can run any code; "
                "if you trust its source pass allow_pickle=True as well"
            )
    found = source.pickles(config, options.get("variant"))
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ValueError(
            f"{source.name}: its weights are pickled ({shown}), and a pickle can run any code when it is read; "
            "use a safetensors copy, or if you trust its source pass allow_pickle=True"
        )
