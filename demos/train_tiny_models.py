"""Train `tiny-falcon` and `tiny-mixtral` on generated English: seeded, resumable, two CPU cores.

    python demos/train_tiny_models.py --model both

Interrupt it when you like and go on with `--resume`: the result is the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import transformer_lens.data as tiny_data
from transformer_lens.data.generate import (
    IOIExample,
    Task,
    ioi_examples,
    padded_prompts,
    repeated_random_tokens,
    training_example,
    training_text,
)
from transformer_lens.model_bridge.calls.tokens import single_token

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
KINDS = ("falcon", "mixtral")
VOCABULARY_LIMIT = 800
MAX_POSITIONS = 256
TARGET_ACCURACY = 0.95

# Sentences of each task in a step, and random sequences (one length per step, so no padding there).
TEXT_BATCH: tuple[tuple[Task, int], ...] = (("ioi", 48), ("successor", 8), ("copying", 16))
RANDOM_TOKENS = 1600
RANDOM_LENGTHS = (8, 24)
# Some longer ones: otherwise the rotary phases of larger distances stay untrained, and repeats of 50
# tokens, a usual choice for finding induction heads, fail altogether.
LONG_SHARE, LONG_LENGTHS = 0.3, (25, 64)

# How much each target counts: what the task asks for, the words around it, and random tokens, which
# nothing predicts.
ANSWER_WEIGHT, CONTEXT_WEIGHT, NOISE_WEIGHT = 1.0, 0.05, 0.01
ROUTER_LOSS_WEIGHT = 0.02


@dataclass(frozen=True)
class Recipe:
    """What fixes a training run; a checkpoint made under another recipe is refused."""

    kind: str
    steps: int
    seed: int = 0
    learning_rate: float = 2e-3
    warmup: int = 150


STEPS = {"falcon": 2400, "mixtral": 2400}
# A parallel block's MLP cannot read what its attention finds, so Falcon is given one more block: with
# three it was still at a coin toss between the two names after 1750 steps.
LAYERS = {"falcon": 4, "mixtral": 3}


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the generated text; it adds no BOS by itself."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(training_text(20_000, seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_config(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The 40B Falcon layout or Mixtral, small enough to ship."""
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": LAYERS[kind],
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.05,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    if kind == "falcon":
        return FalconConfig(
            **shared,
            num_kv_heads=2,
            new_decoder_architecture=True,
            num_ln_in_parallel_attn=2,
            parallel_attn=True,
            multi_query=False,
            alibi=False,
            bias=False,
            ffn_hidden_size=256,
            tie_word_embeddings=True,
        )
    return MixtralConfig(
        **shared,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        output_router_logits=False,
        router_aux_loss_coef=ROUTER_LOSS_WEIGHT,
    )


def build_model(kind: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A freshly initialised model, the same for the same seed."""
    torch.manual_seed(seed)
    config = build_config(kind, tokenizer)
    model_class = FalconForCausalLM if kind == "falcon" else MixtralForCausalLM
    model = model_class(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def text_batch(tokenizer: PreTrainedTokenizerFast, rng: Random) -> tuple[Tensor, Tensor]:
    """Sentences of every task, BOS first and EOS last, and the weight of every token as a target."""
    examples = [training_example(rng, task) for task, count in TEXT_BATCH for _ in range(count)]
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    completions = tokenizer([example.completion for example in examples])["input_ids"]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    width = max(len(prompt) + len(rest) for prompt, rest in zip(prompts, completions, strict=True)) + 2
    rows, weights = [], []
    for prompt, rest in zip(prompts, completions, strict=True):
        spare = width - len(prompt) - len(rest) - 2
        rows.append([bos, *prompt, *rest, eos] + [pad] * spare)
        weights.append(
            [0.0, *[CONTEXT_WEIGHT] * len(prompt), *[ANSWER_WEIGHT] * (len(rest) - 1)]
            + [CONTEXT_WEIGHT] * 2  # the full stop and EOS
            + [0.0] * spare
        )
    return torch.tensor(rows), torch.tensor(weights)


def random_batch(tokenizer: PreTrainedTokenizerFast, rng: Random) -> tuple[Tensor, Tensor]:
    """Repeated random sequences of one length, and the weight of every token as a target."""
    length = rng.randint(*(LONG_LENGTHS if rng.random() < LONG_SHARE else RANDOM_LENGTHS))
    batch = RANDOM_TOKENS // (1 + 2 * length)
    tokens = repeated_random_tokens(plain_token_ids(tokenizer), length, batch, tokenizer.bos_token_id, rng)
    weights = torch.full(tokens.shape, ANSWER_WEIGHT)
    weights[:, : length + 2] = NOISE_WEIGHT
    return tokens, weights


def batch_loss(model: PreTrainedModel, tokens: Tensor, weights: Tensor, pad: int) -> Tensor:
    """The weighted mean of the next-token loss, with the experts' balance for a mixture."""
    mixture = model.config.model_type == "mixtral"
    output = model(tokens, **({"output_router_logits": True} if mixture else {}))
    losses = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
    if mixture:
        config, real = model.config, (tokens != pad).float()
        # One layer at a time: pooled over layers, one collapsed layer can hide behind another.
        for logits in output.router_logits:
            balance = load_balancing_loss_func((logits,), config.num_local_experts, config.num_experts_per_tok, real)
            loss = loss + config.router_aux_loss_coef * balance
    return loss


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warmup = min(recipe.warmup, max(1, recipe.steps // 10))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Training:
    """A run that can stop after any step and go on from its checkpoint to the identical result."""

    def __init__(self, recipe: Recipe, checkpoint_dir: Path, resume: bool = False) -> None:
        self.recipe = recipe
        self.checkpoint = checkpoint_dir / f"tiny-{recipe.kind}-{recipe.seed}.pt"
        self.tokenizer = build_tokenizer()
        self.model = build_model(recipe.kind, self.tokenizer, recipe.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self.rng = Random(recipe.seed)
        self.step = 0
        self.wall_seconds = self.cpu_seconds = 0.0
        if resume and self.checkpoint.exists():
            self.load()

    def save(self) -> None:
        """Write the checkpoint beside its place and move it there: never half a file."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": vars(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
            "seconds": (self.wall_seconds, self.cpu_seconds),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load(self) -> None:
        """Go back to the checkpoint, which must be of the same recipe."""
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != vars(self.recipe):
            raise SystemExit(
                f"{self.checkpoint}: got a checkpoint of {state['recipe']}, expected "
                f"{vars(self.recipe)}; pass the same options or start without --resume"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        self.step = state["step"]
        self.wall_seconds, self.cpu_seconds = state["seconds"]

    def take_step(self) -> float:
        """One optimizer step on a batch of sentences and a batch of random sequences."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        self.optimizer.zero_grad()
        total = 0.0
        for make in (text_batch, random_batch):
            tokens, weights = make(self.tokenizer, self.rng)
            loss = batch_loss(self.model, tokens, weights, self.tokenizer.pad_token_id)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return total

    def run(self, stop_after: int | None = None, save_every: int = 250) -> bool:
        """Train to the end, or to step `stop_after`; returns whether the end is reached."""
        end = min(self.recipe.steps, stop_after or self.recipe.steps)
        wall, cpu = time.perf_counter(), time.process_time()
        wall_before, cpu_before = self.wall_seconds, self.cpu_seconds
        self.model.train()
        label = f"tiny-{self.recipe.kind}"
        with tqdm(total=self.recipe.steps, initial=self.step, desc=label, mininterval=2) as bar:
            while self.step < end:
                loss = self.take_step()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                self.wall_seconds = wall_before + time.perf_counter() - wall
                self.cpu_seconds = cpu_before + time.process_time() - cpu
                if self.step % save_every == 0 or self.step == end:
                    self.save()
        self.model.eval()
        return self.step >= self.recipe.steps


# -- what is measured: held-out accuracy, and how tokens spread on experts --------------------------------------


def plain_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Every token id but the special ones: what random sequences are drawn from."""
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


@torch.no_grad()
def ioi_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[IOIExample] | None = None
) -> float:
    """The share of prompts (by default 400 with unseen name pairs) where the most likely token of the whole vocabulary
    is the indirect object."""
    examples = examples if examples is not None else ioi_examples(400, seed=1)
    tokens, last = padded_prompts(tokenizer, [example.prompt for example in examples])
    logits = model(tokens).logits[torch.arange(len(tokens)), last]
    answers = [single_token(tokenizer, example.answer) for example in examples]
    return float((logits.argmax(-1) == torch.tensor(answers)).float().mean())


@torch.no_grad()
def repeated_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lengths: Sequence[int] = (8, 12, 16, 20, 24),
    batch: int = 40,
    seed: int = 1,
) -> float:
    """The share of right predictions over the whole vocabulary in the second half of repeated random sequences, from
    its second token on (its first token cannot be told from the past)."""
    rng, token_ids = Random(seed), plain_token_ids(tokenizer)
    right = total = 0
    for length in lengths:
        tokens = repeated_random_tokens(token_ids, length, batch, tokenizer.bos_token_id, rng)
        hits = model(tokens).logits[:, length + 1 : -1].argmax(-1) == tokens[:, length + 2 :]
        right, total = right + int(hits.sum()), total + hits.numel()
    return right / total


@torch.no_grad()
def expert_shares(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The share of held-out tokens that each expert of each layer is given: [layers, experts]. Half of the tokens are
    indirect-object prompts, half repeated random sequences."""
    text, last = padded_prompts(tokenizer, [example.prompt for example in ioi_examples(100, seed=2)])
    random = repeated_random_tokens(plain_token_ids(tokenizer), 12, 100, tokenizer.bos_token_id, Random(2))
    real = torch.arange(text.shape[1]) <= last[:, None]
    shares = [_routed(model, text, real), _routed(model, random, torch.ones_like(random).bool())]
    counts = torch.stack(shares).sum(0)
    return counts / counts.sum(-1, keepdim=True)


def _routed(model: PreTrainedModel, tokens: Tensor, real: Tensor) -> Tensor:
    """How many real tokens each expert of each layer is given: [layers, experts]."""
    config = model.config
    counts = []
    for logits in model(tokens, output_router_logits=True).router_logits:
        chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices[real.reshape(-1)]
        counts.append(torch.bincount(chosen.reshape(-1), minlength=config.num_local_experts))
    return torch.stack(counts).float()


def measure(training: Training) -> dict[str, Any]:
    """Held-out accuracies and what the run took, all measured."""
    model, tokenizer = training.model, training.tokenizer
    measured: dict[str, Any] = {
        "seed": training.recipe.seed,
        "steps": training.step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_ioi_accuracy": round(ioi_accuracy(model, tokenizer), 4),
        "held_out_repeated_accuracy": round(repeated_accuracy(model, tokenizer), 4),
        "wall_seconds": round(training.wall_seconds, 1),
        "cpu_seconds": round(training.cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if training.recipe.kind == "mixtral":
        shares = expert_shares(model, tokenizer)
        measured["expert_shares"] = [[round(s, 3) for s in row] for row in shares.tolist()]
    return measured


def export(training: Training, folder: Path, measured: dict[str, Any]) -> None:
    """The model and tokenizer in Hugging Face format, and what was measured."""
    training.model.save_pretrained(folder)
    training.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is saved readable by its owner only
    (folder / "training.json").write_text(json.dumps(measured, indent=2) + "\n")


def train_and_export(recipe: Recipe, options: argparse.Namespace) -> bool:
    """Train one model, print its held-out accuracies, save it; whether both reach the target."""
    training = Training(recipe, options.checkpoint_dir, options.resume)
    if not training.run(options.stop_after):
        print(f"tiny-{recipe.kind}: stopped after step {training.step}; go on with --resume")
        return True
    measured = measure(training)
    accuracies = {name: measured[f"held_out_{name}_accuracy"] for name in ("ioi", "repeated")}
    for name, accuracy in accuracies.items():
        print(f"tiny-{recipe.kind}: held-out {name} accuracy {accuracy:.2%}")
    folder = options.out / f"tiny-{recipe.kind}"
    export(training, folder, measured)
    print(f"tiny-{recipe.kind}: {training.wall_seconds:.0f} s, saved to {folder}")
    return all(accuracy >= TARGET_ACCURACY for accuracy in accuracies.values())


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=(*KINDS, "both"), default="both")
    parser.add_argument("--out", type=Path, default=Path(tiny_data.__file__).parent)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: per model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("build/tiny-checkpoints"))
    parser.add_argument("--stop-after", type=int, help="stop at this step, leaving a checkpoint")
    # One, as the shipped models were trained: sums depend on the number of threads in their last bits.
    parser.add_argument("--threads", type=int, default=1, help="more are faster (default: 1)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train the chosen models; the exit status is 1 when a held-out accuracy misses its target."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    kinds = KINDS if options.model == "both" else (options.model,)
    reached = [train_and_export(Recipe(kind, options.steps or STEPS[kind], options.seed), options) for kind in kinds]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
