"""The two configurations: every row of the agreed table, and every edge of the names they are loaded by."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, FalconConfig, MixtralConfig
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralDecoderLayer

from tests.support import FALCON_SMALL, MIXTRAL_SMALL, falcon, mixtral
from transformer_lens.distributed import AutoDistributedConfig, DistributedFalconConfig, DistributedMixtralConfig
from transformer_lens.distributed.protocol.configs import CLIENT_SETTINGS

KINDS = {"falcon": DistributedFalconConfig, "mixtral": DistributedMixtralConfig}
PLAIN = {"falcon": FalconConfig(**FALCON_SMALL), "mixtral": MixtralConfig(**MIXTRAL_SMALL)}
HUB = {
    "tiiuae/falcon-180B": ("falcon", "falcon-180B"),
    "tiiuae/falcon-7b.v2": ("falcon", "falcon-7b-v2"),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", "mistralai/Mixtral-8x7B-v0-1"),
    "mistralai/Mixtral-8x22B": ("mixtral", "mistralai/Mixtral-8x22B"),
}
DEFAULTS = {
    "initial_peers": (),
    "dht_prefix": None,
    "daemon_startup_timeout": 60,
    "show_route": "inference",
    "allowed_servers": None,
    "blocked_servers": None,
    "connect_timeout": 5,
    "request_timeout": 180,
    "update_period": 60,
    "max_retries": 5,
    "same_libraries": True,
    "limits": None,
    "min_backoff": 1,
    "max_backoff": 60,
    "ban_timeout": 15,
    "active_adapter": None,
    "max_pinged": 3,
    "ping_timeout": 2,
}
OF_THE_MODEL = {"pre_seq_len": 0, "tuning_mode": None, "use_chunked_forward": "auto", "chunked_forward_step": 16384}

both = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Keywords under which hub names are found: a cache folder in the layout of the hub, and no network."""
    cache = tmp_path_factory.mktemp("hub")
    for name, (family, _) in HUB.items():
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        PLAIN[family].save_pretrained(place / "snapshots" / ("0" * 40))
    return {"cache_dir": str(cache), "local_files_only": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local directory with a Falcon's config."""
    PLAIN["falcon"].save_pretrained(tmp_path / "my.model")
    return tmp_path / "my.model"


def change(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# -- the rows of the table -------------------------------------------------------------------------


def test_where_the_blocks_are_and_their_classes() -> None:
    falcon_kind, mixtral_kind = DistributedFalconConfig, DistributedMixtralConfig
    assert (falcon_kind.block_prefix, mixtral_kind.block_prefix) == ("transformer.h", "model.layers")
    assert (falcon_kind.block_class, falcon_kind.attn_class) == (FalconDecoderLayer, FalconAttention)
    assert (mixtral_kind.block_class, mixtral_kind.attn_class) == (MixtralDecoderLayer, MixtralAttention)


@pytest.mark.parametrize(("family", "model"), [("falcon", falcon()), ("mixtral", mixtral())], ids=["falcon", "mixtral"])
def test_prefix_and_classes_are_those_of_the_model(family, model) -> None:
    blocks = model.get_submodule(KINDS[family].block_prefix)
    assert len(blocks) == 2 and all(type(block) is KINDS[family].block_class for block in blocks)
    attention = [module for module in blocks[0].modules() if type(module) is KINDS[family].attn_class]
    assert len(attention) == 1


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({"num_attention_heads": 71, "multi_query": True}, 71),  # 7B
        ({"num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True}, 16),  # 40B
        ({"num_attention_heads": 232, "num_kv_heads": 8, "new_decoder_architecture": True}, 29),  # 180B
        ({"num_attention_heads": 32, "num_kv_heads": 8, "new_decoder_architecture": True}, 4),  # 11B
        ({"num_attention_heads": 32, "num_kv_heads": None, "new_decoder_architecture": True}, 1),
        ({"num_attention_heads": 32, "multi_query": False}, 1),  # RW
        # The published 40B config says both; the new architecture wins.
        ({"num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True, "multi_query": True}, 16),
        ({"num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True, "multi_query": False}, 16),
    ],
)
def test_key_value_groups_of_falcon(fields, groups) -> None:
    config = DistributedFalconConfig(hidden_size=64 * fields["num_attention_heads"], **fields)
    assert config.num_key_value_groups == groups
    assert config.query_heads_per_key == groups


def test_key_value_groups_of_mixtral() -> None:
    config = DistributedMixtralConfig(num_attention_heads=32, num_key_value_heads=8)
    assert (config.num_key_value_groups, config.query_heads_per_key) == (1, 4)


@pytest.mark.parametrize("name", HUB)
def test_the_prefix_of_a_hub_name(name, hub) -> None:
    family, prefix = HUB[name]
    config = KINDS[family].from_pretrained(name, **hub)
    assert config.dht_prefix == prefix
    assert config.block_uid(3) == f"{prefix}.3"
    assert config.block_uid(3).count(".") == 1


@both
@pytest.mark.parametrize("prefix", ["mine", "a/b", "falcon-180B"])
def test_an_explicit_prefix_is_kept(family, prefix, hub) -> None:
    name = next(name for name, (kind, _) in HUB.items() if kind == family)
    assert KINDS[family].from_pretrained(name, dht_prefix=prefix, **hub).dht_prefix == prefix


@both
@pytest.mark.parametrize("prefix", ["a.b", "a b", "a\tb", " ", "", "a\n", "a\u00a0b"])
def test_a_prefix_that_would_split_uids_is_refused(family, prefix, hub) -> None:
    name = next(name for name, (kind, _) in HUB.items() if kind == family)
    with pytest.raises(ValueError, match="dht_prefix: got .* expected a name without '.' and blanks"):
        KINDS[family].from_pretrained(name, dht_prefix=prefix, **hub)
    with pytest.raises(ValueError, match="dht_prefix"):
        KINDS[family](dht_prefix=prefix)


@both
def test_pad_token_id(family, hub) -> None:
    name = next(name for name, (kind, _) in HUB.items() if kind == family)
    kind = KINDS[family]
    assert PLAIN[family].pad_token_id is None
    assert kind.from_pretrained(name, **hub).pad_token_id == 0
    assert kind.from_pretrained(name, pad_token_id=None, **hub).pad_token_id == 0
    assert kind.from_pretrained(name, pad_token_id=7, **hub).pad_token_id == 7
    config, unused = kind.from_pretrained(name, return_unused_kwargs=True, nobody=1, max_retries=2, **hub)
    assert (config.pad_token_id, config.max_retries, unused) == (0, 2, {"nobody": 1})


@pytest.mark.parametrize("name", HUB)
def test_only_180b_names_log_a_licence(name, hub, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="transformer_lens"):
        KINDS[HUB[name][0]].from_pretrained(name, **hub)
    said = [record for record in caplog.records if record.name.startswith("transformer_lens")]
    assert len(said) == ("180B" in name)
    assert all("licence" in record.getMessage() and name in record.getMessage() for record in said)


# -- the edges of names ----------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", [Path("tiiuae/falcon-180B"), "tiiuae/falcon-180B/", Path("tiiuae/falcon-180B/")])
def test_paths_and_trailing_slashes(spelled, hub) -> None:
    config = DistributedFalconConfig.from_pretrained(spelled, **hub)
    assert (config.dht_prefix, config.name_or_path) == ("falcon-180B", "tiiuae/falcon-180B")
    assert AutoDistributedConfig.from_pretrained(spelled, **hub).dht_prefix == "falcon-180B"


def test_positional_arguments_are_those_of_transformers(hub) -> None:
    for kind in (DistributedFalconConfig, AutoDistributedConfig):
        config = kind.from_pretrained("tiiuae/falcon-180B", hub["cache_dir"], False, True)
        assert config.dht_prefix == "falcon-180B"


@pytest.mark.parametrize("kind", [DistributedFalconConfig, DistributedMixtralConfig, AutoDistributedConfig])
def test_no_name_at_all(kind) -> None:
    with pytest.raises(ValueError, match="got None, expected a hub name or a directory"):
        kind.from_pretrained(None)


@pytest.mark.parametrize("spell", [str, Path, lambda folder: f"{folder}/"])
def test_a_local_directory_has_to_say_its_prefix(folder, spell) -> None:
    for kind in (DistributedFalconConfig, AutoDistributedConfig):
        with pytest.raises(
            ValueError, match=r"is a local directory and its config names no dht_prefix.*pass dht_prefix="
        ):
            kind.from_pretrained(spell(folder))
        assert kind.from_pretrained(spell(folder), dht_prefix="mine").dht_prefix == "mine"
    change(folder, dht_prefix="saved")
    assert DistributedFalconConfig.from_pretrained(spell(folder)).dht_prefix == "saved"
    assert DistributedFalconConfig.from_pretrained(spell(folder), dht_prefix="mine").dht_prefix == "mine"
    change(folder, dht_prefix="sa.ved")
    with pytest.raises(ValueError, match="dht_prefix: got 'sa.ved'"):
        DistributedFalconConfig.from_pretrained(spell(folder))


def test_a_directory_wins_over_the_hub_name(hub, tmp_path, monkeypatch) -> None:
    PLAIN["falcon"].save_pretrained(tmp_path / "tiiuae" / "falcon-180B")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="local directory"):
        DistributedFalconConfig.from_pretrained("tiiuae/falcon-180B", **hub)


def test_a_shipped_model_goes_by_its_name() -> None:
    assert AutoDistributedConfig.from_pretrained("tiny-falcon").dht_prefix == "tiny-falcon"
    assert AutoDistributedConfig.from_pretrained("tiny-mixtral").dht_prefix == "tiny-mixtral"


def test_peers_in_somebodys_config_are_not_used(folder) -> None:
    change(folder, initial_peers=["/ip4/8.8.8.8/tcp/1/p2p/Qm"], request_timeout=1, pre_seq_len=5, tuning_mode="ptune")
    config = DistributedFalconConfig.from_pretrained(folder, dht_prefix="mine")
    assert (config.initial_peers, config.request_timeout) == ((), 180)
    assert (config.pre_seq_len, config.tuning_mode) == (5, "ptune")


# -- by family -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB)
def test_the_family_is_chosen_by_model_type(name, hub) -> None:
    config, unused = AutoDistributedConfig.from_pretrained(name, return_unused_kwargs=True, nobody=1, **hub)
    assert type(config) is KINDS[HUB[name][0]]
    assert unused == {"nobody": 1}


def test_another_family_is_refused(folder, hub) -> None:
    with pytest.raises(
        ValueError, match=r'its model_type is "falcon", and DistributedMixtralConfig is for \'mixtral\''
    ):
        DistributedMixtralConfig.from_pretrained("tiiuae/falcon-180B", **hub)
    change(folder, model_type="opt")
    with pytest.raises(ValueError, match="model_type 'opt' is not supported; of the "):
        AutoDistributedConfig.from_pretrained(folder, dht_prefix="mine")


# -- settings --------------------------------------------------------------------------------------


@both
def test_defaults(family) -> None:
    config = KINDS[family]()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert {name: getattr(config, name) for name in OF_THE_MODEL} == OF_THE_MODEL
    assert set(CLIENT_SETTINGS) == set(DEFAULTS)


@both
def test_the_models_own_fields_are_untouched(family) -> None:
    plain, config = PLAIN[family], KINDS[family](**(FALCON_SMALL if family == "falcon" else MIXTRAL_SMALL))
    assert {name: getattr(config, name) for name in plain.to_dict() if name != "architectures"} == {
        name: getattr(plain, name) for name in plain.to_dict() if name != "architectures"
    }
    assert isinstance(config, type(plain))
    assert '"hidden_size": 32' in repr(config)


BAD = [
    ({"request_timeout": 0}, ValueError, "request_timeout: got 0, expected a time in seconds, above 0 and finite"),
    ({"connect_timeout": float("inf")}, ValueError, "connect_timeout: got inf"),
    ({"ping_timeout": float("nan")}, ValueError, "ping_timeout: got nan"),
    ({"update_period": True}, ValueError, "update_period: got True"),
    ({"daemon_startup_timeout": None}, ValueError, "daemon_startup_timeout: got None"),
    ({"ban_timeout": "1"}, ValueError, "ban_timeout: got '1'"),
    ({"max_retries": -1}, ValueError, "max_retries: got -1, expected a whole number, at least 0"),
    ({"max_retries": None}, ValueError, "max_retries: got None"),
    ({"max_retries": 1.5}, ValueError, "max_retries: got 1.5"),
    ({"max_pinged": 0}, ValueError, "max_pinged: got 0, expected a whole number, at least 1"),
    ({"pre_seq_len": True}, ValueError, "pre_seq_len: got True"),
    ({"chunked_forward_step": 0}, ValueError, "chunked_forward_step: got 0"),
    ({"initial_peers": "one"}, TypeError, "initial_peers: got 'one', expected a list of strings"),
    ({"initial_peers": None}, TypeError, "initial_peers: got None, expected a list of strings"),
    ({"allowed_servers": [1]}, TypeError, r"allowed_servers: got \[1\], expected a list of strings or None"),
    ({"blocked_servers": [""]}, TypeError, "blocked_servers: got"),
    ({"show_route": 1}, ValueError, "show_route: got 1, expected one of True, False, 'inference'"),
    ({"tuning_mode": "tune"}, ValueError, "tuning_mode: got 'tune', expected one of None, 'ptune', 'deep_ptune'"),
    ({"tuning_mode": "ptune"}, ValueError, "tuning_mode='ptune' trains pre_seq_len prompts, and pre_seq_len is 0"),
    ({"use_chunked_forward": None}, ValueError, "use_chunked_forward: got None, expected one of True, False, 'auto'"),
    ({"min_backoff": 3, "max_backoff": 2}, ValueError, "min_backoff: got 3, expected at most max_backoff, 2"),
    ({"dht_prefix": 3}, TypeError, "dht_prefix: got int, expected a str or None"),
]


@pytest.mark.parametrize(("fields", "kind", "text"), BAD)
def test_settings_that_do_not_fit(fields, kind, text) -> None:
    with pytest.raises(kind, match=text):
        DistributedFalconConfig(**fields)
    with pytest.raises(kind, match=text):
        AutoDistributedConfig.from_pretrained("tiny-mixtral", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_retries": 0, "min_backoff": 2, "max_backoff": 2},
        {"allowed_servers": [], "blocked_servers": ("Qm",), "initial_peers": ["/ip4/127.0.0.1/tcp/1"]},
        {"tuning_mode": "deep_ptune", "pre_seq_len": 4},
        {"show_route": False, "use_chunked_forward": True, "active_adapter": "mine"},
    ],
)
def test_settings_that_fit(fields) -> None:
    config = AutoDistributedConfig.from_pretrained("tiny-falcon", **fields)
    assert {name: getattr(config, name) for name in fields} == fields


# -- saving ----------------------------------------------------------------------------------------


@both
def test_a_saved_config_has_no_client_in_it(family, tmp_path) -> None:
    given = {"initial_peers": ["/ip4/127.0.0.1/tcp/1"], "dht_prefix": "mine", "max_retries": 1, "active_adapter": "a"}
    config = AutoDistributedConfig.from_pretrained(f"tiny-{family}", pre_seq_len=3, tuning_mode="ptune", **given)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not set(written) & set(CLIENT_SETTINGS)
    assert written["model_type"] == family
    assert not set(config.to_dict()) & set(CLIENT_SETTINGS)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    assert not set(json.loads((tmp_path / "config.json").read_text())) & set(CLIENT_SETTINGS)
    assert config.initial_peers == given["initial_peers"]

    again = AutoDistributedConfig.from_pretrained(tmp_path, dht_prefix="mine")
    assert type(again) is type(config)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert (again.pre_seq_len, again.tuning_mode, again.max_retries) == (3, "ptune", 5)
    plain = AutoConfig.from_pretrained(tmp_path)
    assert (plain.model_type, plain.hidden_size) == (family, config.hidden_size)


def test_without_a_prefix_there_is_no_uid() -> None:
    with pytest.raises(ValueError, match="this config has no dht_prefix"):
        DistributedFalconConfig().block_uid(0)


def test_neither_hivemind_nor_msgpack_is_needed_to_import() -> None:
    program = (
        "import sys\n"
        "sys.modules['hivemind'] = sys.modules['msgpack'] = None\n"
        "from transformer_lens.distributed import AutoDistributedConfig, LocalSpan\n"
        "assert AutoDistributedConfig.from_pretrained('tiny-falcon').num_key_value_groups == 2\n"
        "from transformer_lens.distributed.protocol.messages import Request, pack_request\n"
        "try:\n"
        "    pack_request(Request('info', 0, 0))\n"
        "except ImportError as error:\n"
        "    assert 'transformer-lens-bridge[swarm]' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
