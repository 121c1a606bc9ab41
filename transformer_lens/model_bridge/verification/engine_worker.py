"""Runs one engine on models, in that engine's own environment: `python -P engine_worker.py ENGINE FOLDER ...`.

A folder holds a model and `ENGINE.task.json`; beside them this leaves `ENGINE.safetensors` and `ENGINE.json`.
It imports nothing of this package, whose name one of the engines has too.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

SAID = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, OSError, AssertionError)
"""What an engine raises is its answer."""


def flat(value: Any, at: str) -> Iterator[tuple[str, Tensor]]:
    """Copies of the tensors in nested arguments, by their place: `blocks.0.attn|kwargs|position_embeddings|1`."""
    if isinstance(value, Tensor):
        yield at, value.detach().clone(memory_format=torch.contiguous_format)
    elif isinstance(value, (dict, tuple, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{at}|{key}")


class Task:
    """What is asked of a model, and what an engine said."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder, self.found, self.refused = folder, dict[str, Tensor](), dict[str, str]()
        self.asked = json.loads((folder / f"{engine}.task.json").read_text())
        self.names, self.modules = self.asked["names"], self.asked["modules"]
        self.tokens = torch.tensor(self.asked["tokens"])

    def model(self) -> Any:
        """The model in the hands of transformers."""
        kind = getattr(transformers, transformers.AutoConfig.from_pretrained(self.folder).architectures[0])
        return kind.from_pretrained(self.folder, **self.asked["loading"]).eval()

    def tokenizer(self) -> Any:
        """The model's own, or one of a single word: some engines cannot do without."""
        if not (self.folder / "tokenizer.json").exists():
            from tokenizers import Tokenizer, models

            words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
            special = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "<unk>")
            transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(self.folder)
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def keep(self, at: str, seen: Any) -> None:
        self.found.update(flat(seen, at))


def bare(task: Task) -> None:
    """Plain torch hooks, and the model's own `hidden_states`."""
    model = task.model()
    for name, path in task.modules.items():
        enter = partial(lambda name, _, args, kwargs: task.keep(name, {"args": args, "kwargs": kwargs}), name)
        leave = partial(lambda name, _, args, output: task.keep(name, {"output": output}), name)
        model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True)
        model.get_submodule(path).register_forward_hook(leave)
    output = model(task.tokens, output_hidden_states=True)
    task.keep("model", {"output": output[0], "hidden": output.hidden_states})


def nnsight(task: Task) -> None:
    from nnsight import TransformersModel

    model = TransformersModel(task.model(), tokenizer=task.tokenizer(), task="text-generation")
    paths = {name: f"model.{path}" for name, path in task.modules.items()}
    with model.trace(task.tokens) as tracer:
        cache = tracer.cache(modules=[*paths.values()], include_inputs=True)
        output = model.output.save()
    task.keep("model", {"output": output[0]})
    for name, path in paths.items():
        if path in cache:
            args, kwargs = cache[path].inputs
            task.keep(name, {"args": args, "kwargs": kwargs, "output": cache[path].output})


def transformer_lens(task: Task) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    made = {"hf_model": task.model(), "tokenizer": task.tokenizer(), "device": "cpu"}
    bridge: Any = TransformerBridge.boot_transformers(str(task.folder), **made)
    for switches in ({}, {"attn_result": True, "split_qkv_input": True}, {"split_qkv_input": False, "attn_in": True}):
        try:
            for switch, on in switches.items():
                getattr(bridge, f"set_use_{switch}")(on)
            _, cache = bridge.run_with_cache(task.tokens)
        except SAID:
            if not switches:
                raise
            continue  # this model has no such switch
        for ours, names in task.names.items():
            theirs = next((name for name in names if name in cache), None)
            if theirs is not None and ours not in task.found:
                task.keep(ours, cache[theirs])


def interp_engine(task: Task) -> None:
    from interp_engine import capture
    from interp_engine.model import EagerModel

    model = EagerModel(str(task.folder), hf_model=task.model(), tokenizer=task.tokenizer())
    served = dict[str, str]()
    for ours, points in task.names.items():
        reasons = {point: model.refuses(point) for point in points}
        theirs = [point for point, reason in reasons.items() if reason is None]
        if theirs:
            served[ours] = theirs[0]
        else:
            task.refused[ours] = str(reasons[points[-1]])
    try:
        cache = capture(model, task.tokens, list(served.values()))
        for ours, point in served.items():
            task.keep(ours, cache[point])
    except SAID:  # which of them it is
        for ours, point in served.items():
            try:
                task.keep(ours, capture(model, task.tokens, [point])[point])
            except SAID as error:
                task.refused[ours] = f"{type(error).__name__}: {error}"


ENGINES = {
    "transformers": bare,
    "nnsight": nnsight,
    "transformer-lens": transformer_lens,
    "interp-engine": interp_engine,
}


def main(engine: str, *folders: str) -> None:
    """Answer the task in each folder. What an engine says of a model as a whole is refused as "*"."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for task in (Task(Path(folder), engine) for folder in folders):
        try:
            with torch.no_grad():
                ENGINES[engine](task)
        except SAID as error:
            task.found, task.refused = {}, {"*": f"{type(error).__name__}: {error}"}
        save_file(task.found, task.folder / f"{engine}.safetensors")
        said = {"refused": task.refused, "order": list(task.found)}
        (task.folder / f"{engine}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
