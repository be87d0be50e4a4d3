"""Extracting an adapter from two models, by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy as library
from cli_files import EQUAL, PARAMS, adapted, floats, tensors_of, updates
from helpers import assert_close, tolerance

import lora_jax
from lora_jax.cli import main
from lora_jax.cli._read.match import canonical
from lora_jax.io import hf, safetensors


def test_extract_of_folders_finds_what_was_merged(cli):
    found = cli("extract", "model", "tuned", "out", "--rank", "2", "--base-model", "b", "--json")
    assert found["error"] < tolerance()
    assert {row["rank"] for row in found["entries"]} == {2}
    cli("diff", "out", "adapter", *EQUAL)
    cli("verify", "out", "model")
    cli("merge", "model", "out", "merged")
    cli("diff", "merged", "tuned", *EQUAL)


@pytest.mark.parametrize("pair", [("model", "tuned"), ("params", "tuned_params")])
def test_extract_truncates_as_the_svd_does(pair, cli):
    words = ("extract", *pair, "out")
    found = cli(*words, "--rank", "1", "--json")
    expected = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    for row in found["entries"]:
        s = np.linalg.svd(expected[canonical(row["path"])], compute_uv=False)
        assert row["kept"] == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=tolerance())
        assert row["error"] == pytest.approx(np.sqrt(1 - row["kept"]), rel=tolerance())
        assert row["norm"] == pytest.approx(np.linalg.norm(s), rel=tolerance())
    text = cli("extract", *pair, "more_out", "--energy", "0.9", "--alpha", "4")
    assert "4 weights; 9" in text
    rows = cli("inspect", "more_out", "--json")["entries"]
    assert all(row["alpha"] == pytest.approx(4, rel=tolerance()) for row in rows)


def test_extract_to_other_formats(cli, here):
    cli("extract", "params", "tuned_params", "one", "--rank", "2", "--to", "safetensors")
    found = safetensors.load("one", PARAMS)  # of this very base
    expected = lora_jax.merge(adapted({}, 2))
    assert_close(lora_jax.merge(found), expected)
    cli(
        "extract",
        "params",
        "tuned_params",
        "two",
        "--rank",
        "2",
        "--to",
        "peft",
        "--names",
        "llama",
    )
    cli("diff", "two", "adapter", *EQUAL)
    cli("extract", "model", "tuned", "three", "--rank", "2", "--to", "orbax")
    cli("diff", "three", "adapter", *EQUAL)
    words = (
        "extract",
        "model",
        "tuned",
        "four",
        "--rank",
        "2",
        "--targets",
        r".*0.*q_proj\.weight",
    )
    cli(*words, "--ignore-rest")
    assert len(cli("inspect", "four", "--json")["entries"]) == 1


def test_extract_of_a_tied_table_is_of_both_or_refused(cli, refused):
    """PEFT's adapter of a table leaves the head as it was; ours is of one parameter."""
    table, kernel = (np.asarray(floats(*shape)) for shape in ((7, 6), (6, 6)))
    config = {"model_type": "llama", "tie_word_embeddings": True}
    for folder, x in (("before", 0), ("after", 1)):
        params = {"embed_tokens": {"embedding": table + x}}
        params |= {"layers": {"0": {"self_attn": {"q_proj": {"kernel": kernel + x}}}}}
        hf.save(folder, {"model": params}, "llama", config=config)
    words = ("extract", "before", "after", "out", "--rank", "6", "--rest", "full")
    refused(*words, match="'model.embed_tokens' changed, and 'lm_head' is tied to it: PEFT would")
    cli(*words, "--to", "safetensors")
    for like in ((), ("--like", "before")):
        refused("convert", "out", "no", "--to", "peft", *like, match="or may be: tied")
    cli("merge", "before", "out", "merged")
    found = tensors_of("merged")
    assert "lm_head.weight" not in found
    assert_close(found["model.embed_tokens.weight"], table + 1)
    cli(*words[:3], "less", "--rank", "6", "--rest", "ignore")


def test_extract_of_bare_files_names_modules_as_beside_a_head(cli, here):
    for folder, x in (("before", 0), ("after", 1)):
        Path(folder).mkdir()
        names = {"wte.weight": np.ones((7, 6)), "h.0.attn.c_attn.weight": np.ones((6, 6)) + x}
        names = {name: y.astype(np.float32) for name, y in names.items()}
        library.save_file(names, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text('{"model_type": "gpt2"}')
    cli("extract", "before", "after", "out", "--rank", "1")
    module = "base_model.model.transformer.h.0.attn.c_attn"
    found = library.load_file(Path("out") / "adapter_model.safetensors")
    assert found.keys() == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    cli("merge", "before", "out", "merged")
    assert_close(tensors_of("merged")["h.0.attn.c_attn.weight"], np.full((6, 6), 2.0), length=6)
    cli("convert", "out", "own.safetensors", "--to", "safetensors")
    cli("convert", "own.safetensors", "back", "--to", "peft")
    assert json.loads((Path("back") / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_extract_of_other_layers(cli, here):
    def save(folder, **tensors):
        Path(folder).mkdir()
        library.save_file(tensors, Path(folder) / "model.safetensors")
        config = {"model_type": "gpt2", "architectures": ["GPT2Model"]}
        (Path(folder) / "config.json").write_text(json.dumps(config))

    before = {
        "h.0.attn.c_attn.weight": np.asarray(floats(6, 9)),
        "wte.weight": np.asarray(floats(11, 6)),
        "conv.weight": np.asarray(floats(5, 4, 3)),
        "ln.weight": np.asarray(floats(6)),
        "head.bias": np.asarray(floats(6)),
        "head.weight": np.asarray(floats(6, 6)),
    }
    after = {name: x + np.asarray(floats(*x.shape)) for name, x in before.items()}
    save("before", **before)
    save("after", **after)
    words = ("extract", "before", "after", "out", "--targets", r"(h\.|wte|conv).*weight")
    found = cli(*words, "--rank", "99", "--rest", "full", "--json")
    assert len(found["entries"]) == 3
    assert sorted(found["full"]) == ["head/bias", "head/weight", "ln/weight"]
    cli("merge", "before", "out", "merged")
    merged = tensors_of("merged")
    for name, x in after.items():
        assert_close(merged[name], x)
    (here / "before" / "config.json").unlink()
    assert main(["extract", "before", "after", "no", "--rank", "1"]) == 2


DENSE = [f"layers.0.mlp.{x}" for x in ("shared_expert.up_proj", "shared_expert_gate", "shared.fc")]
HEADS = ["embed_out", "lm_head"]
TABLES = ["embed_in", "shared", "encoder.embed_tokens", "wte"]


def test_extract_tells_dense_layers_from_heads_and_tables(cli, here):
    before = {f"{x}.weight": np.asarray(floats(6, 4)) for x in (*DENSE, *HEADS, *TABLES)}
    after = {name: x + np.asarray(floats(*x.shape)) for name, x in before.items()}
    for folder, found in (("before", before), ("after", after)):
        (here / folder).mkdir()
        library.save_file(found, here / folder / "model.safetensors")
        (here / folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    words = ("extract", "before", "after")
    found = cli(*words, "dense", "--rank", "4", "--rest", "ignore", "--json")
    assert sorted(row["path"] for row in found["entries"]) == sorted(f"{x}.weight" for x in DENSE)
    cli(*words, "all", "--rank", "4", "--targets", ".*weight")
    kinds = {row["path"]: row["kind"] for row in cli("inspect", "all", "--json")["entries"]}
    assert kinds == dict.fromkeys(DENSE + HEADS, "Linear") | dict.fromkeys(TABLES, "Embedding")
    cli("merge", "before", "all", "merged")
    for name, x in tensors_of("merged").items():
        assert_close(x, after[name])


def test_extract_refuses(refused, here, capsys):
    words = ("extract", "model", "tuned", "out")
    refused(*words, match="one of the arguments --rank --energy is required")
    refused(*words, "--rank", "1", "--energy", "0.5", match="not allowed with argument")
    refused(*words, "--energy", "2", match="--energy 2.0: expected a share")
    refused(*words, "--rank", "1", "--targets", "nothing", match="selects nothing")
    refused(
        *words,
        "--rank",
        "1",
        "--targets",
        ".*0.*q_proj.*",
        match=r"3 tensors changed that are no targets: .* --rest full",
    )
    refused(*words, "--rank", "1", "--to", "orbax", "--names", "llama", match="go with --to peft")
    refused("extract", "model", "model", "out", "--rank", "1", match="are equal: there is nothing")
    refused(
        "extract", "params", "params", "out", "--rank", "1", match="are equal: there is nothing"
    )
    refused("extract", "model", "params", "out", "--rank", "1", match="of different formats")
    refused(
        "extract", "model", "adapter", "out", "--rank", "1", match="adapter is an adapter, expec"
    )
    refused("extract", "model", "tuned", "adapter", "--rank", "1", match="adapter exists")
    words = (
        "extract",
        "params",
        "tuned_params",
        "out",
        "--rank",
        "1",
        "--targets",
        ".*0.*q_proj.*",
    )
    refused(*words, match=r"no targets: .*To leave .*: --rest ignore; to take them in full")

    def edited(**changes):
        found = tensors_of("model") | changes
        found = {name: x for name, x in found.items() if x is not None}
        library.save_file(found, "tuned/model.safetensors")

    words = ("extract", "model", "tuned", "out", "--rank", "1")
    edited(**{"score.weight": None})
    refused(*words, match="tuned has no tensor 'score.weight', which model has")
    edited(more=np.ones(2))
    refused(*words, match="model has no tensor 'more', which tuned has")
    edited(**{"score.weight": np.ones((2, 2))})
    refused(*words, match=r"'score.weight' has shape \(3, 8\) in model and \(2, 2\) in tuned")
    edited(**{"score.weight": np.ones((3, 8), np.float32)})
    refused(*words, match="1 tensors changed that are no targets: score.weight")
    refused(*words, "--ignore-rest", match="no linear layer changed, but score.weight")
    q = "model.layers.0.self_attn.q_proj.weight"
    edited(**{q: np.full((8, 8), np.nan, np.float32)})
    refused(*words, match=f"'{q}' is not finite")
    library.save_file({"n": np.arange(3), "q.weight": np.ones((2, 2))}, "params/one")
    library.save_file({"n": np.arange(3) + 1, "q.weight": np.ones((2, 2))}, "params/two")
    words = ("extract", "params/one", "params/two", "out", "--rank", "1", "--targets")
    refused(
        *words, "none.*|n.*", match="'none.*|n.*' selects nothing. It matches only n: no weight of"
    )
    for name, x in (("i", np.ones((2, 2), bool)), ("e", np.ones((0, 2))), ("v", np.ones(2))):
        library.save_file({f"{name}.weight": x}, f"params/{name}")
        message = {"i": "dtype bool", "e": "empty", "v": "1-D"}[name]
        words = ("extract", f"params/{name}", f"params/{name}", "out", "--rank", "1", "--targets")
        refused(*words, ".*", match=f"{name}.weight: {message}")
    words = ("extract", "params/one", "params/two", "out", "--rank", "1", "--rest", "full")
    refused(*words, match="'n' changed, and cannot train fully: dtype int64")
