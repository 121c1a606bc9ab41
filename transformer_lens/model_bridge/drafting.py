"""`TransformerBridge.draft`: an adapter proposed from one forward, tried, and held to the laws of `verify`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from inspect import signature
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

import transformer_lens.model_bridge.generalized_components as kinds
from transformer_lens.checks import file_to_write, in_words
from transformer_lens.model_bridge.access.ports import FlatTokensPort
from transformer_lens.model_bridge.access.weights import inner_model
from transformer_lens.model_bridge.architecture_adapter import EVERYWHERE, HEADS, KEYS, ArchitectureAdapter, head_of
from transformer_lens.model_bridge.calls.inputs import main_output
from transformer_lens.model_bridge.generalized_components import Branch, MixerBridge, Part, linears
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, all_shipped, nearest_family, walk
from transformer_lens.model_bridge.upstream import POSITIONS
from transformer_lens.model_bridge.verification.evidence import ModuleCall, tensors, undisturbed, watching
from transformer_lens.model_bridge.verification.report import FINDINGS, CheckResult, VerificationReport

SHAPE, MOST_LINES = (2, 11), 40
NORMS = [vars(kinds)[name] for name in kinds.__all__ if re.fullmatch(r"(?!Final|Normali).*NormBridge", name)]
STAGES = {vars(kinds)[name]: name for name in ("PARALLEL", "PARALLEL_ONE_NORM", "SEQUENTIAL")}
ATTENTIONS = [vars(kinds)[name] for name in kinds.__all__ if name.endswith("AttentionBridge")]
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
ALSO = {"q": "query wq", "k": "key wk", "v": "value wv", "qkv": "Wqkv", "o": "wo", "in": "fc1", "out": "fc2"}


@dataclass(frozen=True)
class Draft:
    """A proposed adapter. `failed` names the first law that failed, and where; unused until saved or registered."""

    model_type: str
    nearest: str
    failed: str = ""
    source: str = ""
    adapter: type[ArchitectureAdapter] | None = None
    report: VerificationReport | None = None

    def save(self, path: str | Path) -> None:
        """Write the source to a file. Raises `ValueError`, and writes nothing, if a law failed."""
        if self.failed:
            raise ValueError(f"draft of {self.model_type!r} is not written, since a law does not hold: {self.failed}")
        file_to_write("path", path).write_text(self.source, encoding="utf-8")


class Misfit(ValueError):
    """What no adapter can describe: the law that it breaks, and where."""


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.numel() != b.numel():
        return False
    return torch.allclose(a.flatten(), b.flatten(), rtol=1e-3, atol=1e-4 * float(b.abs().max()))


class Proposal:
    """What one forward says of each layer; `refused` counts the kinds that broke a law, by layer and role."""

    def __init__(self, model: Any) -> None:
        self.config, self.modules = model.config, dict(model.named_modules())
        self.inner: Any = inner_model(model)[1]
        base = next(name for name, module in self.modules.items() if module is self.inner.base_model)
        self.at: Any = lambda name: name.removeprefix(base).lstrip(".")
        self.calls, self.names, self.used = dict[str, ModuleCall](), dict[Any, list[str]](), set[str]()
        self.refused, self.shared, self.eps = Counter[str](), False, 0.0
        vocabulary = model.get_input_embeddings().weight.shape[0]
        told = {name: getattr(self.config, name) for name in self.config.attribute_map} | self.config.to_dict()
        told |= {name: value for name in DEPTHS if (value := getattr(self.config, name, None))}  # it may be a property
        self.told = {name: value for name, value in told.items() if name.isidentifier()}  # as they become code
        with undisturbed(model), watching(self.modules, self.calls):
            self.logits = main_output(model((torch.arange(3, 25) % vocabulary).view(SHAPE).to(model.device)))
        lists = [[f"{name}.{n}" for n, _ in m.named_children() if n.isdigit()] for name, m in self.modules.items()]
        self.blocks = max((blocks for blocks in lists if all(map(self.passes, blocks))), key=len)
        if not self.blocks:
            raise Misfit("fires: no list of modules hands a stream from one to the next")
        general = [Part(k, "", linears({h.port.at: "" for h in k.hooks if h.port.at})) for k in ATTENTIONS]
        parts = {"attn": general, "mlp": []}
        for role, _, part in (found for _, places in all_shipped().values() for found in places):
            self.names.setdefault((part.kind, role), ALSO.get(role, "").split()).append(part.at)
            parts["mlp"] += [part] if role == "mlp" else []
        self.templates = {role: list({(p.kind, *p.parts): p for p in found}.values()) for role, found in parts.items()}

    def received(self, name: str) -> Any:
        return self.calls[name].input if name in self.calls else None

    def returned(self, name: str) -> Any:
        return tensors(self.calls[name].output)[0] if name in self.calls else None

    def passes(self, name: str) -> bool:
        x, out = self.received(name), self.returned(name)
        return x is not None and out is not None and out.shape == x.shape and x.shape[:-1] == SHAPE

    def below(self, name: str) -> list[str]:
        return [other for other in self.calls if other.rpartition(".")[0] == name]

    def norms(self, names: list[str]) -> list[str]:
        return [n for n in names if "Norm" in type(self.modules[n]).__name__ and self.passes(n) and not self.below(n)]

    def fitted(self, template: Part, host: str) -> Part | None:
        """A part with this model's names for its roles; `None` if a role has no module here."""
        ports, x, parts = {hook.name: hook.port for hook in template.kind.hooks}, self.received(host), {}
        if "hook_in" in ports and (x is None or (x.ndim == 2) != isinstance(ports["hook_in"], FlatTokensPort)):
            return None
        for role, sub in template.parts.items():
            name = next((n for n in self.names.get((sub.kind, role), ()) if f"{host}.{n}" in self.calls), "")
            found = self.fitted(sub, f"{host}.{name}") if name else None
            if found is None:
                return None
            parts[role] = replace(found, at=name)
        sizes = {"d_mlp": self.received(f"{host}.{parts['out'].at}").shape[-1]} if "out" in parts else {}
        if "experts" in parts:
            into, out = self.modules[f"{host}.{parts['experts'].at}"].down_proj.shape[1:]
            sizes["d_mlp"] = out if into == self.received(self.blocks[0]).shape[-1] else into
        return replace(template, at=host.rpartition(".")[2], parts=parts, sizes=sizes, scales={})

    def inside(self, host: str, layer: int) -> tuple[str, Part]:
        """The role of a module and the part to try next: of those that fit, the one with the most roles."""
        for role, templates in self.templates.items():
            fits = [part for part in (self.fitted(template, host) for template in templates) if part is not None]
            if role == "mlp":
                own = {n for n in self.below(host) if [*self.modules[n].parameters(recurse=False)]}
                fits = [part for part in fits if own <= {f"{host}.{path}" for _, path, _ in walk(part)}]
            fits.sort(key=lambda part: (-len([*walk(part)]), len(part.kind.__mro__)))
            for part in fits[self.refused[f"blocks.{layer}.{role}"] :]:
                return role, part
        return "mixer", Part(MixerBridge, host.rpartition(".")[2])

    def spread(self, first: str, second: str) -> bool:
        """Whether two modules of a block are the linear layers of an MLP that has no module of its own."""
        hidden, read = self.returned(first), self.received(second)
        if self.below(first) or self.below(second) or hidden is None or read is None:
            return False
        return hidden.shape == read.shape != self.received(first).shape  # type: ignore[no-any-return]

    def between(self, first: str, second: str, layer: int) -> tuple[str, Part]:
        if self.refused[f"blocks.{layer}.mlp"]:
            raise Misfit(f"stream: {first} and {second} are no MLP")
        into, out = (name.rpartition(".")[2] for name in (first, second))
        sizes = {"d_mlp": self.received(second).shape[-1]}
        return "mlp", Part(kinds.SpreadMLPBridge, "", linears({"in": into, "out": out}), sizes=sizes)

    def norm(self, name: str) -> Part:
        """A norm whose own formula gives what was seen; else a closed one."""
        given = {key: value.detach() for key, value in self.modules[name]._parameters.items() if value is not None}
        eps = next((value for key, value in vars(self.modules[name]).items() if "eps" in key), 0.0)
        self.eps = eps or self.eps
        call: Any = SimpleNamespace(first=self.received(name), cfg=SimpleNamespace(eps=eps), wants=lambda hook: False)
        call.fire, call.weight = (lambda hook, value: value), (lambda _, key="weight": given[key])
        fits = [kind for kind in NORMS if {*kind.attributes} == {*given}]
        right = [kind for kind in fits if same(kind.formula(kind.__new__(kind), call), self.returned(name))]
        return Part(right[0] if right else kinds.NormalizationBridge, name.rpartition(".")[2])

    def layer(self, layer: int, block: str) -> Part:
        """A block: its branches, from what each reads and what is added to the stream."""
        below, norms, parts = self.below(block), self.norms(self.below(block)), dict[str, Part]()
        mixers = [n for n in below if n not in norms and [*self.modules[n].parameters()]]
        spread = {a: b for a, b in pairwise(mixers) if self.spread(a, b)}
        mixers = [n for n in mixers if n not in spread.values()]
        streams, stages, sums = [self.received(block)], list[list[Branch]]([[]]), [0]
        for nth, mixer in enumerate(mixers, start=1):
            read, out = self.received(mixer), self.returned(spread.get(mixer, mixer))
            role, part = self.between(mixer, spread[mixer], layer) if mixer in spread else self.inside(mixer, layer)
            before = next((n for n in norms if same(read, self.returned(n))), "")
            behind = next((n for n in norms if n != before and same(self.received(n), out)), "")
            stream, added = self.received(before) if before else read, self.returned(behind) if behind else out
            role = "mlp" if role == "mixer" and mixer == mixers[-1] and "mlp" not in parts else role
            role = "mixer" if role in parts else role
            if role in parts or stream is None or added is None or added.numel() != streams[0].numel():
                raise Misfit(f"stream: {mixer} is no branch: one too many, or not from the stream and back")
            if not same(stream, streams[-1]):
                streams, stages, sums = [*streams, stream.reshape(streams[0].shape)], [*stages, []], [*sums, 0]
            used = [key for key, p in parts.items() if before and p.at == before.rpartition(".")[2]]
            pre = (used or [f"ln{1 + len({'ln1', 'ln2'} & {*parts})}"])[0] if before else ""
            post = f"{pre or f'ln{nth}'}_post" if behind else ""
            parts |= {key: self.norm(name) for key, name in ((pre, before), (post, behind)) if key}
            parts[role] = Part(MixerBridge, part.at) if role == "mixer" else part
            stages[-1].append(Branch(pre, role, post, adds="mlp.out" if mixer in spread else ""))
            sums[-1] = sums[-1] + added.reshape(streams[0].shape)
        for change, (start, end) in zip(sums, pairwise([*streams, self.returned(block)]), strict=True):
            if not same(start + change, end):
                raise Misfit(f"stream: {block} does not add what its modules return to what it reads")
        return Part(kinds.BlockBridge, self.at(block.rpartition(".")[0]), parts, tuple(map(tuple, stages)))

    def refuse(self, failures: list[CheckResult] | None) -> bool:
        """Give up the kinds that broke a law; where none is named, all mixtures, attentions or MLPs that are open."""
        places = [(f"blocks.{i}.{role}", part) for i, x in enumerate(self.layers) for role, part in x.parts.items()]
        opened = {at: part for at, part in places if part.kind is not MixerBridge and at.endswith(("attn", "mlp"))}
        broken = {".".join((result.hook or result.component).split(".")[:3]) for result in failures or ()}
        mixtures = [at for at, part in opened.items() if "experts" in part.parts and failures is None]
        wrong = [at for at in opened if at in broken] or mixtures or [*opened]
        self.refused.update([at for at in wrong if at.endswith("attn")] or wrong)
        return bool(opened)

    def source(self, nearest: str) -> str:
        """The file of an adapter. Raises `Misfit` if it would be longer than a file of data should be."""
        layers = self.layers = [self.layer(layer, block) for layer, block in enumerate(self.blocks)]
        parts = sorted((p for x in layers for _, _, p in walk(x) if p.sizes), key=lambda p: "experts" not in p.parts)
        self.d_mlp = parts[0].sizes["d_mlp"] if parts else None
        roles = dict.fromkeys(role for layer in layers for role in layer.parts)
        texts = {role: self.chosen([self.written(x.parts.get(role)) for x in layers]) for role in roles}
        inside = "{" + ", ".join(f"{role!r}: {text}" for role, text in texts.items()) + "}"
        if any(role not in x.parts for role in roles for x in layers):
            inside = f"{{role: part for role, part in {inside}.items() if part}}"
        stages = self.chosen([STAGES.get(x.stages, self.written(x.stages)) for x in layers])
        made = {"layer": lines(8, f"return Part(BlockBridge, {layers[0].at!r}, {inside}, {stages})")}
        ends = ", ".join(f"{role!r}: {self.written(part)}" for role, part in self.ends().items())
        made["outside"] = lines(8, f"return {{{ends}, 'blocks': self.layer}}")
        data = self.data()
        made["variant"] = lines(8, f"return {self.other!r}")
        made["data"] = "\n".join(lines(4, f"{name} = {text}") for name, text in data.items())
        words = ", ".join(word for word in sorted(kinds.__all__) if re.search(rf"\b{word}\b", str(made.values())))
        name = "".join(word.capitalize() for word in re.split(r"\W|_", self.config.model_type))
        file = files("transformer_lens.data").joinpath("adapter.txt").read_text(encoding="utf-8")
        made["parts"] = lines(0, f"from {kinds.__name__} import ({words})")
        text = file.format(name=name, nearest=nearest, **made)
        if len(text.splitlines()) > MOST_LINES:
            raise Misfit(f"lines: its adapter has {len(text.splitlines())}, at most {MOST_LINES} fit")
        return text

    def written(self, value: Any) -> str:
        """A part or stages as Python: their representation, without what is empty; sizes as fields of the config."""
        text = re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", repr(value))
        text = re.sub(r", (parts|sizes|scales)=\{\}|, stages=\(\)|, (post_norm|adds)=''|, scale(_in)?=1\.0", "", text)
        text = re.sub(r"\b(kind|at|parts|stages|norm|mixer)=", "", text)
        for size in map(int, re.findall(r"sizes=\{'d_mlp': (\d+)", text)):
            like = [n for n, v in self.told.items() if v == size and re.search("intermediate|ffn|inner|mlp", n)]
            told = f", sizes={{'d_mlp': {f'self.config.{like[0]}' if like else size}}}" if size != self.d_mlp else ""
            self.used |= {*like[:1]} if told else set()
            text = text.replace(f", sizes={{'d_mlp': {size}}}", told)
        plain = re.compile(r"('\w+'): Part\(LinearBridge, ('[\w.]+')\)")
        row = re.compile(rf"\{{(?:{plain.pattern}(?:, )?)+\}}")
        return row.sub(lambda found: f"linears({plain.sub(lambda one: f'{one[1]}: {one[2]}', found[0])})", text)

    def chosen(self, texts: list[str]) -> str:
        """The text of each layer, told apart by a field of the config; else by the layer's number."""
        says = {f"self.config.{n}[layer]": [*map(str, v)] for n, v in self.told.items() if type(v) in (list, tuple)}
        for name, value in self.told.items():
            if type(value) is int and 0 < value < len(texts) and re.search("layer|dense|first", name):
                says[f"layer < self.config.{name}"] = [str(i < value) for i in range(len(texts))]
        for text, values in says.items() if len({*texts}) > 1 else ():
            if len(values) == len(texts) and len({*zip(values, texts, strict=True)}) == len({*values}):
                self.used |= {*re.findall(r"config\.(\w+)", text)}
                of = dict(zip(values, texts, strict=True))
                for value, kind in of.items():
                    others = {other for key, other in of.items() if key != value}
                    if len(others) == 1:
                        return f"({kind} if str({text}) == {value!r} else {others.pop()})"
                items = ", ".join(f"{value!r}: {kind}" for value, kind in of.items())
                return f"{{{items}}}[str({text})]"
        distinct = list(dict.fromkeys(texts))
        return (
            texts[0] if len(distinct) == 1 else f"({', '.join(distinct)})[{tuple(map(distinct.index, texts))}[layer]]"
        )

    def ends(self) -> dict[str, Part]:
        """What is outside the blocks. Raises `Misfit` if no norm follows them, or the head has an unknown name."""
        embed = next(n for n, m in self.modules.items() if m is self.inner.get_input_embeddings())
        inside = self.blocks[0].rpartition(".")[0]
        outside = [n for n in self.calls if "." in n and not n.startswith(inside) and n != embed and not self.below(n)]
        finals = [n for n in self.norms(outside) if same(self.received(n), self.returned(self.blocks[-1]))]
        if not finals or head_of(self.inner) is None:
            raise Misfit(f"norm: none reads what the last block returns, or no head has a name of {', '.join(HEADS)}")
        norm, found = self.norm(finals[-1]), {"embed": Part(kinds.EmbeddingBridge, self.at(embed))}
        for role, kind in (("rotary_emb", kinds.RotaryEmbeddingBridge), ("pos_embed", kinds.PositionEmbeddingBridge)):
            like = [n for n in outside if re.search({"pos_embed": "pos|wpe"}.get(role, "rotary"), n)]
            found |= {role: Part(kind, self.at(like[0]))} if len(like) == 1 else {}
            self.shared |= role == "pos_embed" and len(like) == 1 and self.returned(like[0]).ndim < 3
        final = vars(kinds).get(f"Final{norm.kind.__name__}", norm.kind)
        return {**found, "ln_final": Part(final, self.at(finals[-1]))}

    def data(self) -> dict[str, str]:
        """The fields of the class: what the config calls its numbers, and which of its settings the forward had."""
        usual, ends = [names for names, _ in all_shipped().values()], self.ends()
        positions = "standard" if "pos_embed" in ends else "rotary" if "rotary_emb" in ends else "none"
        other = {"positional_embedding_type": positions, "normalization_type": "RMS" if "RMS" in str(ends) else "LN"}
        measured = {"d_mlp": self.d_mlp, "eps": self.eps}
        seen: dict[str, Any] = {"n_ctx": 2048, "act_fn": "unknown", "n_heads": 1, **measured}
        names, told = dict[str, str](), {n: v for n, v in self.told.items() if v is not None}
        for what in dict.fromkeys(key for row in usual for key in row):
            known = [row[what] for row in usual if what in row]
            fits = [n for n in known if n in told and told[n] == measured.get(what, told[n])]
            names |= {what: max(fits, key=known.count)} if fits else {}
            other |= {what: seen[what]} if not fits and seen.get(what) else {}
        family: Any = next(kind for kind in type(self.config).__mro__ if kind.__module__.startswith("transformers."))
        drops = [n for n, value in self.told.items() if "drop" in n and isinstance(value, float)]
        known = [*names.values(), *self.used, *drops, *KEYS, *EVERYWHERE, *(f.name for f in fields(PreTrainedConfig))]
        rest = [(f.name, f.default, getattr(family(), f.name)) for f in fields(family) if f.name not in known]
        moved = [name for name, *usual in rest if self.told.get(name) not in usual]
        given = {"model_type": self.config.model_type, "cfg_names": names, "config_keys": tuple(sorted(self.used))}
        given |= {"block_returns_tuple": isinstance(self.calls[self.blocks[0]].output, tuple)}
        given |= {"dropouts": tuple(drops), "harmless": tuple(moved)}
        text = {name: repr(value) for name, value in given.items() if value}
        if positions == "standard":
            hooks = {"root_hooks": "(*ROOT_HOOKS, POSITION_HOOK)", "absent": "{}"}
            text |= {"absent": "{'hook_pos_embed': 'every text gets the same'}"} if self.shared else hooks
        told_positions = set(POSITIONS.names) & set(signature(type(self.inner).forward).parameters)
        text |= {} if told_positions else {"takes_positions": "False"}
        self.other, scaled = other, not same(self.logits, self.returned(str(head_of(self.inner))))
        return text | ({"changes_logits": "lambda self: True"} if scaled else {})


def lines(indent: int, text: str) -> str:
    text = text if '"' in text else text.replace("'", '"')
    return fill(text, 119, break_on_hyphens=False, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4))


def tried(bridge: Any, model: Any, found: Draft) -> Draft:
    try:
        exec(compile(found.source, "<draft>", "exec"), {})  # all names in it are written by repr
        with bridge(model) as made:
            report = made.verify(progress=False)
    except (*FINDINGS, ArithmeticError, SyntaxError) as error:
        return replace(found, failed=f"fires: verify cannot be run: {type(error).__name__}: {error}", report=None)
    finally:
        adapter: Any = ADAPTERS.pop(found.model_type, None)
    failed = [*(result.sentence() for result in report.failures()), ""]
    return replace(found, failed=failed[0], adapter=adapter, report=report)


def drafted(bridge_class: type[Any], model: Any) -> Draft:
    if not isinstance(model, nn.Module):
        raise TypeError(f"draft: got {in_words(model)}, expected a Hugging Face model")
    config: Any = model.config
    if config.model_type in ADAPTERS:
        raise ValueError(f"draft: {config.model_type!r} has an adapter already: TransformerBridge(model) uses it")
    found = Draft(config.model_type, nearest_family(model))
    try:
        proposal = Proposal(model)
        while True:
            found = tried(bridge_class, model, replace(found, source=proposal.source(found.nearest)))
            if not found.failed or not proposal.refuse(found.report.failures() if found.report else None):
                return found
    except Misfit as misfit:
        return replace(found, failed=str(misfit))
