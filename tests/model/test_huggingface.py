"""Models of transformers and OpenAI's GPT-2 keep their logits in our GPT; variants are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.model import huggingface
from tests.support.tiny_models import save_random_gpt2, save_tokenizer, tiny_gpt

TOKENS = torch.arange(12)[None]


def logits_of(model):
    with torch.no_grad():
        return model.hidden(TOKENS) @ model.wte.weight[: model.shape.vocab_size].T


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_we_load_what_transformers_saves_and_openai_published_with_equal_logits(tmp_path):
    theirs = save_random_gpt2(tmp_path)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits_of(huggingface.load_hf(tmp_path)), expected, atol=1e-4, rtol=0)
    # OpenAI's published files have no prefix and contain attention masks
    path = tmp_path / "model.safetensors"
    published = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    published |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(published, path)
    torch.testing.assert_close(logits_of(huggingface.load_hf(tmp_path)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "llama"}, BadConfig, "model_type is 'llama'"),
        ({"activation_function": "relu"}, BadConfig, "activation_function is 'relu'"),
        ({"n_inner": 7}, BadConfig, "n_inner is 7"),
        ({"layer_norm_epsilon": 1e-6}, BadConfig, "layer_norm_epsilon is 1e-06"),
        ({"n_embd": "wide"}, BadConfig, "does not describe a GPT-2"),
        ({"n_layer": 3}, BadData, r"h\.2\.attn\.c_attn\.bias is missing"),
    ],
)
def test_a_variant_that_we_do_not_compute_is_refused(tmp_path, changes, error, message):
    save_random_gpt2(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        huggingface.load_hf(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(MissingInput, match=r"config\.json is missing"):
        huggingface.load_hf(tmp_path)
    save_random_gpt2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 50_000)
    with pytest.raises(BadData, match="is not a valid safetensors file"):
        huggingface.load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"model\.safetensors is missing"):
        huggingface.load_hf(tmp_path)


@pytest.mark.parametrize("words", [1, 15, 40])  # the context is 16 tokens
def test_a_pipeline_writes_until_the_context_is_full_with_gpt2s_tokenizer(tmp_path, words):
    import transformers

    encoding = save_tokenizer(tmp_path / "tokenizer")
    huggingface.save_hf(tiny_gpt(encoding.n_vocab), tmp_path / "hf", tmp_path / "tokenizer")
    write = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    prompt = " the" * words
    tokens = write.tokenizer(prompt)["input_ids"]
    assert tokens == encoding.encode_ordinary(prompt)
    assert write.tokenizer.eos_token_id == encoding.eot_token
    if len(tokens) < 16:
        found = write(prompt, return_tensors=True)[0]["generated_token_ids"]
        assert len(tokens) < len(found) <= 16
    # transformers' own way with a long prompt: its end is continued
    text = write(prompt, handle_long_generation="hole", max_new_tokens=4, return_full_text=False)
    assert text[0]["generated_text"]
    with pytest.raises(MissingInput, match=r"has no encoder\.json"):  # only GPT-2's tokenizer can be exported
        huggingface.save_hf(tiny_gpt(40), tmp_path / "other", tmp_path)
    assert not (tmp_path / "other").exists()
