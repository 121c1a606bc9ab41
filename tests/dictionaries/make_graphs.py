"""Writes small models and transcoders, and the attribution graphs that circuit-tracer 0.5 makes of them.

`make dictionary-fixtures` runs it with circuit-tracer's own Python. With `--time PLACE` it writes one larger case there
instead, and how long circuit-tracer took; `make bench-graphs` compares.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from circuit_tracer import attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.create_graph_files import create_graph_files
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights, convert_llama_weights
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from transformer_lens import HookedTransformerConfig

FILES = Path(__file__).parent / "files" / "graphs"
VOCAB = 61
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
LARGER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
OPTIONS = {"device": torch.device("cpu"), "dtype": torch.float32}
ENDS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def scrambled(module: torch.nn.Module, scale: float = 1.0) -> None:
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "threshold" in name:
                value.fill_(0.5)
            elif value.ndim > 1:
                value.copy_(scale * torch.randn_like(value) / value.shape[-1] ** 0.5)
            else:
                value.add_(0.2 * torch.randn_like(value))


def language_model(kind: str, sizes: dict) -> tuple:
    """A random model by transformers, and the same in TransformerLens's terms."""
    common = {"vocab_size": VOCAB, "max_position_embeddings": 128, "num_key_value_heads": 2, **sizes}
    if kind == "gemma2":
        config = Gemma2Config(
            **common, head_dim=8, sliding_window=64, query_pre_attn_scalar=8, hidden_activation="gelu_pytorch_tanh"
        )
        config._attn_implementation = "eager"  # the other ones leave out the cap of the scores
        model, convert = Gemma2ForCausalLM(config), convert_gemma_weights
    else:
        model, convert = LlamaForCausalLM(LlamaConfig(**common)), convert_llama_weights
    scrambled(model, 1.5)
    model.tie_weights()
    config = model.eval().config
    d_head = 8 if kind == "gemma2" else config.hidden_size // config.num_attention_heads
    said = {
        **{"d_model": config.hidden_size, "d_head": d_head, "n_heads": config.num_attention_heads},
        **{"d_mlp": config.intermediate_size, "n_layers": config.num_hidden_layers, "n_ctx": 128, "d_vocab": VOCAB},
        **{"eps": config.rms_norm_eps, "n_key_value_heads": 2, "normalization_type": "RMS", "final_rms": True},
        **{"positional_embedding_type": "rotary", "rotary_dim": d_head, "gated_mlp": True, "device": "cpu"},
        **{"rotary_adjacent_pairs": False, "act_fn": "silu", "model_name": kind, "original_architecture": kind},
    }
    if kind == "gemma2":
        said |= {"act_fn": "gelu_pytorch_tanh", "attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0}
        said |= {"use_normalization_before_and_after": True, "use_attn_scale": True, "attn_scale": 8**0.5}
    return model, HookedTransformerConfig(**said), convert


def transcoders(kind: str, config: HookedTransformerConfig, width: int) -> torch.nn.Module:
    layers, d_model = config.n_layers, config.d_model
    if kind == "cross_layer":
        made = CrossLayerTranscoder(layers, width, d_model, "jump_relu", lazy_decoder=False, **ENDS, **OPTIONS)
        scrambled(made)
        return made
    jump = {layer: JumpReLU(torch.zeros(width)) for layer in range(layers)}
    parts = {
        layer: SingleLayerTranscoder(
            d_model, width, jump[layer] if kind == "gemma2" else torch.relu, layer, kind == "gemma2", **OPTIONS
        )
        for layer in range(layers)
    }
    made = TranscoderSet(parts, **ENDS)
    scrambled(made)
    return made


def make(kind: str, place: Path, sizes: dict, width: int, length: int, keep: bool = True) -> None:
    torch.manual_seed(0)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    hf_model, config, convert = language_model(kind, sizes)
    made = transcoders(kind, config, width)
    hf_model.save_pretrained(place / "model")
    ends = "".join(f"{key}: {value}\n" for key, value in ENDS.items())
    (place / "transcoders").mkdir()
    made.to_safetensors(str(place / "transcoders"))
    cross = kind == "cross_layer"
    says = f"model_name: {kind}\nmodel_kind: {'cross_layer_transcoder' if cross else 'transcoder_set'}\n{ends}"
    (place / "transcoders" / "config.yaml").write_text(says)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")),
        unk_token="w0",
        bos_token="w1",
        pad_token="w2",
    )
    words.save_pretrained(place / "words")
    words = AutoTokenizer.from_pretrained(place / "words")
    config.tokenizer_name = str(place / "words")
    with torch.no_grad():
        state = {name: value.detach().clone() for name, value in convert(hf_model, config).items()}
    model = TransformerLensReplacementModel(config, tokenizer=words)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(
        "mask" in n or "IGNORE" in n or "rotary" in n for n in missing.missing_keys
    )
    model._configure_replacement_model(made)
    tokens = torch.randint(3, VOCAB, (length,))
    tokens[0] = 1
    expected = hf_model(tokens[None]).logits[0, -1]
    torch.testing.assert_close(model(tokens[None])[0, -1], expected, rtol=1e-4, atol=1e-4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, begin = time.perf_counter(), time.process_time()
    graph = attribute(tokens, model, batch_size=64)
    took = {
        "cpu_seconds": time.process_time() - begin,
        "seconds": time.perf_counter() - wall,
        "nodes": len(graph.adjacency_matrix),
    }
    took["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    (place / "took.json").write_text(json.dumps(took))
    graph.scan = "none"
    pruned = prune_graph(graph)
    save_file(
        {
            "tokens": tokens,
            "adjacency": graph.adjacency_matrix,
            "features": graph.active_features.contiguous(),
            "values": graph.activation_values.detach(),
            "logits": graph.logit_token_ids,
            "probabilities": graph.logit_probabilities.detach(),
            "node_mask": pruned.node_mask,
            "edge_mask": pruned.edge_mask,
            "cumulative": pruned.cumulative_scores,
            "scores": torch.tensor(compute_graph_scores(graph)),
        },
        place / "graph.safetensors",
    )
    if keep:
        (place / "took.json").unlink()
        create_graph_files(graph, "graph", place / "viewer", scan="none")
    shutil.rmtree(place / "words")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--time"]:
        make("llama", Path(sys.argv[2]), LARGER, 80, 16, keep=False)
    else:
        for case in ("llama", "gemma2", "cross_layer"):
            make(case, FILES / case, SMALL, 24, 8)
