"""`hooks`: a model's hook table, whole or filtered, from its config alone."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from typer import Argument, Context

from transformer_lens.cli.options import (
    PUBLISHED,
    AsJson,
    Revision,
    TrustRemoteCode,
    complete_model,
    complete_shape,
    named,
    output,
    quiet,
    write_json,
)
from transformer_lens.cli.running import load_package


def complete_hook(context: Context, incomplete: str) -> list[str]:
    """Names of the model's hooks, at layer 0; none for a model that would have to be downloaded."""
    # While an option still lacks its value, arguments cannot be told apart.
    model = context.params.get("model") or next(iter(context.args), "")
    if model not in (*PUBLISHED, *complete_model(model)):
        return []
    load_package()
    from transformer_lens.model_bridge import skeleton_bridge

    names = (row.name.replace("{i}", "0") for row in skeleton_bridge(model).hook_table().present())
    return [name for name in names if name.startswith(incomplete)]


def hooks(
    model: str = Argument(
        ...,
        metavar="MODEL",
        help="A hub name, a directory, a config.json, or a built-in shape such as falcon-40b. No weights are read.",
        autocompletion=complete_shape,
    ),
    patterns: list[str] | None = Argument(
        None,
        metavar="PATTERN",
        help="Only names, or other spellings of them, that contain this. * and ? are wildcards; a layer's number "
        "stands for {i}. Default: all.",
        autocompletion=complete_hook,
        show_default=False,
    ),
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """List every hook of a model with its shape and meaning, and why other names are absent.

    [bold]Examples[/]

    transformer-lens hooks tiny-falcon

    transformer-lens hooks falcon-40b attn.hook_k "ln?.hook_scale"

    transformer-lens hooks tiny-mixtral blocks.1.mlp.hook_expert_out --json
    """
    from transformer_lens.checks import nearest
    from transformer_lens.model_bridge import skeleton_bridge

    loading = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet(), named(model):
        bridge = skeleton_bridge(model, **{name: value for name, value in loading.items() if value})
    wanted = patterns or []
    table, layers = bridge.hook_table(), bridge.cfg.n_layers
    spelled = [(row, (row.name, *row.aliases)) for row in table]
    known = [name for _, names in spelled for name in names]
    for pattern in wanted:
        if not any(matches(pattern, name, layers) for name in known):
            raise KeyError(
                f"no hook of this model matches {pattern!r}; it has {layers} layers, and the nearest names are "
                f"{nearest(pattern, known)}"
            )
    table.rows = [
        row
        for row, names in spelled
        if not wanted or any(matches(pattern, name, layers) for pattern in wanted for name in names)
    ]
    if json:
        rows = [{**row, "shape": list(row["shape"]), "aliases": list(row["aliases"])} for row in table.to_dicts()]
        write_json({"model": model, "architecture": bridge.cfg.architecture, "n_layers": layers, "hooks": rows})
    else:
        output().print(table)


def matches(pattern: str, name: str, layers: int) -> bool:
    """Whether a name in the hook table contains the pattern; `*`, `?` and `[...]` are wildcards."""
    general = re.sub(
        r"^blocks\.(\d+)(?=\.|$)", lambda found: "blocks.{i}" if int(found[1]) < layers else found[0], pattern
    )
    return fnmatchcase(name, f"*{general}*")
