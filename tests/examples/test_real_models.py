"""Real weights go in, train a little, and come out merged; transformers computes the same."""

import json
import math

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close
from tokenizers import Tokenizer

import lora_jax
from lora_jax.io import hf
from lora_jax.recipes.models import llama

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # those of transformers
]


# What sums: the largest axis of both models; twelve sums a layer follow each other, norms included.
MINILM, SMOLLM2 = ({"length": 1536, "depth": 12 * layers} for layers in (6, 30))


def trained(loss, lora_params, tx, batches):
    """The parameters after a step a batch, and the losses."""
    opt_state, losses = tx.init(lora_params), []

    @jax.jit
    def step(lora_params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(lora_params, batch)
        updates, opt_state = tx.update(grads, opt_state, lora_params)
        return optax.apply_updates(lora_params, updates), opt_state, value

    for batch in batches:
        lora_params, opt_state, value = step(lora_params, opt_state, batch)
        losses.append(float(value))
    return lora_params, losses


def opened(there, folder):
    model, info = there.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def test_minilm_becomes_a_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder, reviews = data.minilm(), data.movie_reviews()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(24)
    tokenizer.enable_padding(length=24)

    def inputs(texts):
        found = tokenizer.encode_batch(texts)
        return np.array([e.ids for e in found]), np.array([e.attention_mask for e in found])

    config = transformers.BertConfig.from_pretrained(folder, num_labels=2)
    model = transformers.FlaxBertForSequenceClassification(config, seed=0)  # its head is to stay

    def fn(params, ids, mask):
        return model(ids, mask, params=params).logits

    params = hf.load(folder, model.params, new="classifier/.*")
    lora_params = lora_jax.lorafy(params, 8, targets="all-linear", full="classifier/.*")

    def loss(lora_params, batch):
        ids, mask, labels = batch
        logits = lora_jax.lora(fn)(lora_params, ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    rows = [slice(k, k + 16) for k in range(0, 64, 16)]
    batches = [(*inputs(reviews.train.texts[r]), reviews.train.labels[r]) for r in rows]
    tx = lora_jax.optimizer(optax.adamw(1e-3))
    lora_params, losses = trained(loss, lora_params, tx, batches * 8)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2

    said = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "negative", "1": "positive"},
        "label2id": {"negative": 0, "positive": 1},
    }
    more = {"source": folder, "new": "classifier/.*", "config": said}
    hf.save(tmp_path / "out", lora_params, **more)
    ids, mask = inputs(reviews.test.texts[:64])
    expected = lora_jax.lora(fn)(lora_params, ids, mask)
    there = opened(transformers.AutoModelForSequenceClassification, tmp_path / "out")
    with torch.no_grad():
        found = there(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    assert_close(found, np.asarray(expected), **MINILM)
    assert there.config.id2label == {0: "negative", 1: "positive"}
    base = fn(params, ids, mask)
    assert np.abs(found - base).max() > 0.1  # it has learned something that could be lost


TEXT = """The rank of a product is at most the smaller of the ranks of its factors. A matrix of
low rank is the sum of a few products of a column and a row. """


def test_smollm2_speaks_learns_and_comes_out_merged(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("gguf")
    file = data.smollm2()
    hf.merge(file, {}, tmp_path / "plain")  # a folder of what is in the file
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    model = llama.from_config(config, scan_layers=True)
    ids = jnp.zeros((1, 8), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = hf.load(file, like)
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008
    again = hf.load(tmp_path / "plain", like)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    question = "What is the capital of Italy? Answer in one sentence."
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)

    @jax.jit
    def apply(params, ids):
        return model.apply({"params": params}, ids)

    answer = llama.generate(apply, params, prompt, length=len(prompt) + 16, stop=2)
    assert tokenizer.decode(answer) == "The capital of Italy is Rome."

    layout = lora_jax.layout_of(apply, params, ids)
    lora_params = lora_jax.lorafy(params, 8, targets=".*(q|v|down)_proj.*", layout=layout)
    text = jnp.asarray(tokenizer(TEXT)["input_ids"])[None]

    def loss(lora_params, ids):
        logits = lora_jax.lora(apply)(lora_params, ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    tx = lora_jax.optimizer(optax.adamw(1e-3))
    lora_params, losses = trained(loss, lora_params, tx, [text] * 12)
    assert losses[-1] < losses[0] - 1
    assert math.isclose(losses[0], 3.1, abs_tol=0.7)

    hf.save(tmp_path / "out", lora_params, source=file, shard_size=200_000_000)
    there = opened(transformers.AutoModelForCausalLM, tmp_path / "out")
    with torch.no_grad():
        found = there(torch.tensor(np.asarray(text))).logits.numpy()
    expected = np.asarray(lora_jax.lora(apply)(lora_params, text))
    assert_close(found, expected, **SMOLLM2)
    assert there.config.tie_word_embeddings
