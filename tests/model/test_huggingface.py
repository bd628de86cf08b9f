"""Models of transformers and OpenAI's GPT-2 keep their logits in our GPT; variants are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.model import huggingface
from tests.support.tiny_models import save_random_gpt2, save_tokenizer, tiny_gpt

TOKENS = torch.arange(12)[None]


@torch.no_grad()
def logits_of(folder):
    """Return the logits of our GPT with the weights of a folder."""
    model = huggingface.load_hf(folder)
    return model.hidden(TOKENS) @ model.wte.weight[: model.shape.vocab_size].T


def test_we_load_what_transformers_saves_and_openai_published_with_equal_logits(tmp_path):
    theirs = save_random_gpt2(tmp_path)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits_of(tmp_path), expected, atol=1e-4, rtol=0)
    # OpenAI's published files have no prefix and contain attention masks
    path = tmp_path / "model.safetensors"
    published = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    published |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(published, path)
    torch.testing.assert_close(logits_of(tmp_path), expected, atol=1e-4, rtol=0)


def change(**changes):
    """Return a function that changes the config.json of a folder."""

    def change_config(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change_config


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (change(model_type="llama"), BadConfig, "model_type is 'llama'"),
        (change(activation_function="relu"), BadConfig, "activation_function is 'relu'"),
        (change(n_inner=7), BadConfig, "n_inner is 7"),
        (change(layer_norm_epsilon=1e-6), BadConfig, "layer_norm_epsilon is 1e-06"),
        (change(n_embd="wide"), BadConfig, "does not describe a GPT-2"),
        (change(n_layer=3), BadData, r"h\.2\.attn\.c_attn\.bias is missing"),
        (lambda f: (f / "config.json").unlink(), MissingInput, r"config\.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), MissingInput, r"model\.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50_000), BadData, "not a valid safetensors"),
    ],
)
def test_a_variant_or_file_that_we_can_not_read_is_refused(tmp_path, damage, error, message):
    save_random_gpt2(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
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
