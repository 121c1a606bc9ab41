"""`hooks` and `info`: a model's hook table, and its layout, parameters and memory, from its config alone."""

import re
from fnmatch import fnmatchcase

import typer
from typer import Argument, Context, Option

import transformer_lens.cli.options as options
from transformer_lens.cli.running import Output, load_package

SHORT_DTYPES = ("bf16", "fp16", "fp32")


def complete_hook(context: Context, incomplete: str) -> list[str]:
    """Names of the model's hooks, at layer 0; none for a model that would have to be downloaded."""
    # While an option still lacks its value, arguments cannot be told apart.
    model = context.params.get("model") or next(iter(context.args), "")
    if model not in (*options.PUBLISHED, *options.complete_model(model)):
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
        autocompletion=options.complete_shape,
    ),
    patterns: list[str] | None = Argument(
        None,
        metavar="PATTERN",
        help="Only names, or other spellings of them, that contain this. * and ? are wildcards; a layer's number "
        "stands for {i}. Default: all.",
        autocompletion=complete_hook,
        show_default=False,
    ),
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.AsJson = False,
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
    with options.quiet(), options.named(model):
        bridge = skeleton_bridge(model, **{name: value for name, value in loading.items() if value})
    table, layers = bridge.hook_table(), bridge.cfg.n_layers
    known = [name for row in table for name in (row.name, *row.aliases)]
    fitting = {pattern: {name for name in known if matches(pattern, name, layers)} for pattern in patterns or ["*"]}
    for pattern, names in fitting.items():
        if not names:
            raise KeyError(
                f"no hook of this model matches {pattern!r}; it has {layers} layers, and the nearest names are "
                f"{nearest(pattern, known)}"
            )
    kept = set().union(*fitting.values())
    table.rows = [row for row in table if not kept.isdisjoint((row.name, *row.aliases))]
    if json:
        about = {"model": model, "architecture": bridge.cfg.architecture, "n_layers": layers}
        options.write_json({**about, "hooks": table.to_dicts()})
    else:
        options.output().print(table)


def matches(pattern: str, name: str, layers: int) -> bool:
    """Whether a name in the hook table contains the pattern; `*`, `?` and `[...]` are wildcards."""
    general = re.sub(
        r"^blocks\.(\d+)(?=\.|$)", lambda found: "blocks.{i}" if int(found[1]) < layers else found[0], pattern
    )
    return fnmatchcase(name, f"*{general}*")


def info(
    model: str = Argument(
        ...,
        metavar="MODEL",
        help="A hub name, a directory, a config.json, or a built-in shape such as falcon-40b.",
        autocompletion=options.complete_shape,
    ),
    context: str | None = Option(None, help="Tokens in the KV cache, as 2048,8192. Default: 2048 and the model's."),
    dtype: str = Option("bf16", help="Of the KV cache: bf16, fp16 or fp32."),
    json: bool = Option(False, "--json", help="Print it as JSON, in bytes."),
) -> None:
    """Show a model's layout, parameters and memory (weights and KV cache), from its config alone.

    [bold]Examples[/]

    transformer-lens info falcon-40b --context 2048,8192

    transformer-lens info tiny-mixtral --json
    """
    from transformer_lens.model_bridge import model_info

    found = model_info(model, context=None if context is None else lengths(context), dtype=cache_dtype(dtype))
    if json:
        options.write_json(found.to_dict())
    else:
        Output().print(*found.tables())


def lengths(text: str) -> list[int]:
    """The numbers in a text such as "2048,8192"."""
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        told = f"got {text!r}, expected numbers of tokens with commas between, such as 2048,8192"
        raise typer.BadParameter(told, param_hint="--context")
    return list(map(int, parts))


def cache_dtype(text: str) -> str:
    """The dtype as given. Raises typer's `BadParameter`, exit code 2, for an unknown one."""
    if text in SHORT_DTYPES:
        return text
    try:
        return str(options.dtype_of(text))
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error.message}, or {', '.join(SHORT_DTYPES)}", param_hint="--dtype") from error
