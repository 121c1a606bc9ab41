"""Short names of hooks, as in `cache["q", 0]`, and the full names they stand for."""

from __future__ import annotations

import re

from transformer_lens.checks import a_text, whole

PLACES = {
    "attn": ("q", "k", "v", "z", "q_normed", "k_normed", "rot_q", "rot_k", "result", "pattern", "attn_scores"),
    "mlp": ("pre", "pre_linear", "post", "router_logits", "expert_weights", "expert_indices", "expert_out"),
}

OWNER = {name: owner for owner, names in PLACES.items() for name in names}
SYNONYMS = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
OWNER_SYNONYMS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
FINAL_NORM = ("scale", "normalized")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of a hook; a full name is returned as it is.

    >>> get_act_name("q", 0)
    'blocks.0.attn.hook_q'
    >>> get_act_name("resid_post", 3), get_act_name("embed"), get_act_name("scale")
    ('blocks.3.hook_resid_post', 'hook_embed', 'ln_final.hook_scale')
    >>> get_act_name("normalized", 2, "ln2"), get_act_name("k6")
    ('blocks.2.ln2.hook_normalized', 'blocks.6.attn.hook_k')
    """
    for what, given in (("name", name), *((("layer_type", layer_type),) if layer_type is not None else ())):
        a_text(what, given)
    if layer is not None and not isinstance(layer, str):
        whole("layer", layer)
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    joined = re.fullmatch(r"([a-z_]+?)(\d+)([a-z]?.*)", name)
    if joined and layer is None:
        name, layer, layer_type = joined[1], joined[2], joined[3] or layer_type
    name = SYNONYMS.get(name, name)
    owner = OWNER.get(name) or OWNER_SYNONYMS.get(layer_type or "", layer_type or "")
    block = "" if layer is None else f"blocks.{layer}."
    if not block and not owner and name in FINAL_NORM:
        owner = "ln_final"
    return f"{block}{owner}{'.' if owner else ''}hook_{name}"
