"""Export: one architecture in two forms, equal logits both ways."""

import json

import pytest
import torch

from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.storage import read_json
from compactgpt.model import huggingface
from tests.support.tiny_models import save_tokenizer, tiny_gpt

TOKENS = torch.arange(12)[None]


def logits_of(model):
    with torch.no_grad():
        return model.hidden(TOKENS) @ model.wte.weight[: model.shape.vocab_size].T


def loaded(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_loads_what_we_export_with_equal_logits(tmp_path, gelu, bias):
    model = tiny_gpt(40, gelu=gelu, bias=bias).eval()
    huggingface.save_hf(model, tmp_path / "hf")
    with torch.no_grad():
        found = loaded(tmp_path / "hf")(TOKENS).logits
    torch.testing.assert_close(found, logits_of(model), atol=1e-5, rtol=1e-5)
    assert (
        read_json(tmp_path / "hf/config.json")["activation_function"]
        == {"erf": "gelu", "tanh": "gelu_new"}[gelu]
    )


def save_theirs(folder, **changes):
    import transformers

    torch.manual_seed(1)
    shape = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 39}
    config = transformers.GPT2Config(**{**shape, "eos_token_id": 39, "initializer_range": 0.4, **changes})
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def test_we_load_what_transformers_saves_with_equal_logits(tmp_path):
    """The cross-check of the baselines: logits to 1e-4."""
    theirs = save_theirs(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(huggingface.load_hf(tmp_path)), theirs(TOKENS).logits, atol=1e-4, rtol=0
        )


def test_published_files_have_no_prefix_and_hold_masks(tmp_path):
    state = save_theirs(tmp_path).state_dict()
    published = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    published |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    found, expected = huggingface.from_hf_state(published), huggingface.from_hf_state(state)
    assert found.keys() == expected.keys()
    assert "lm_head.weight" not in found


def test_there_and_back_is_exact(tmp_path):
    model = tiny_gpt(40, padded_vocab_size=40)
    huggingface.save_hf(model, tmp_path / "hf")
    found, expected = huggingface.load_hf(tmp_path / "hf").state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_tokenizer_goes_along(tmp_path):
    import transformers

    encoding = save_tokenizer(tmp_path / "tokenizer")
    huggingface.save_hf(tiny_gpt(encoding.n_vocab), tmp_path / "hf", tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the cat in the other hat, é"
    assert tokenizer(text)["input_ids"] == encoding.encode_ordinary(text)
    assert tokenizer.eos_token_id == encoding.eot_token


def test_only_gpt2s_tokenizer_can_go_along(tmp_path):
    with pytest.raises(MissingInput, match=r"has no encoder\.json"):
        huggingface.save_hf(tiny_gpt(40), tmp_path / "hf", tmp_path)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "llama"), ("activation_function", "relu"), ("n_inner", 7), ("layer_norm_epsilon", 1e-6)],
)
def test_a_variant_that_we_do_not_compute_is_refused(tmp_path, key, value):
    save_theirs(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BadConfig, match=f"{key} is {value!r}"):
        huggingface.load_hf(tmp_path)


def test_a_folder_that_lacks_or_breaks_something_is_named(tmp_path):
    with pytest.raises(MissingInput, match=r"config\.json is missing"):
        huggingface.load_hf(tmp_path)
    save_theirs(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layer": 3}))
    with pytest.raises(BadData, match="does not hold what its config"):
        huggingface.load_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(BadData, match="is no safetensors file"):
        huggingface.load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"model\.safetensors is missing"):
        huggingface.load_hf(tmp_path)


@pytest.mark.parametrize("words", [1, 5, 14, 15, 16, 40])  # the context is 16 tokens
def test_a_pipeline_writes_until_the_context_is_full_and_says_so_of_a_longer_prompt(tmp_path, words):
    import transformers

    encoding = save_tokenizer(tmp_path / "tokenizer")
    model = tiny_gpt(encoding.n_vocab)
    assert model.shape.block_size == 16
    huggingface.save_hf(model, tmp_path / "hf", tmp_path / "tokenizer")
    write = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    prompt = " the" * words
    fed = len(write.tokenizer(prompt)["input_ids"])
    if fed < 16:
        tokens = write(prompt, return_tensors=True)[0]["generated_token_ids"]
        assert fed < len(tokens) <= 16
    else:
        with pytest.raises(ValueError, match="`max_length` is set to 16"):
            write(prompt)
    # transformers' own answer to a long prompt: its end is continued
    text = write(prompt, handle_long_generation="hole", max_new_tokens=4, return_full_text=False)
    assert text[0]["generated_text"]
