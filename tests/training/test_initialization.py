import json
import warnings

import pytest
import torch

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.model.gpt import GPT
from compactgpt.model.huggingface import save_hf
from compactgpt.training.checkpoint import save_model
from compactgpt.training.initialization import folder_sha256, initial_model
from tests.support.tiny_gpt import tiny, tokens_of
from tests.support.training_recipe import recipe


def start_from(folder, shape, **changes):
    sha256 = changes.pop("sha256", None) or folder_sha256(folder)
    return initial_model(shape, recipe(init_from=str(folder), init_sha256=sha256, **changes))


@pytest.fixture
def gpt2(tmp_path):
    """A random GPT-2 that transformers made and saved, with weights that tell everything apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    twin = GPT2LMHeadModel(settings).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in twin.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        twin.save_pretrained(tmp_path / "gpt2")
    return twin, tmp_path / "gpt2"


def test_training_starts_from_gpt2_with_its_logits_cropped_and_padded(gpt2):
    twin, folder = gpt2
    model = start_from(folder, tiny(bias=True, gelu="tanh"))  # context 12 -> 8, 50 -> 64 rows
    tokens, targets = tokens_of(3, 8)
    expected = twin(tokens).logits
    logits = model.hidden(tokens) @ model.wte.weight.T
    torch.testing.assert_close(logits[..., :50], expected, atol=1e-4, rtol=1e-4)
    plain = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    share_of_padding = logits.softmax(-1)[..., 50:].sum(-1)
    assert share_of_padding.max() < 14 / 64
    assert model(tokens, targets).item() == pytest.approx(plain.item(), abs=0.3)


def test_the_published_files_keys_without_prefix_are_read_too(gpt2):
    from safetensors.torch import load_file, save_file

    twin, folder = gpt2
    tensors = {
        name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    save_file(tensors, folder / "model.safetensors")
    model = start_from(folder, tiny(bias=True, gelu="tanh"))
    tokens, _ = tokens_of(2, 8)
    logits = (model.hidden(tokens) @ model.wte.weight.T)[..., :50]
    torch.testing.assert_close(logits, twin(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_training_starts_from_a_model_of_ours(tmp_path, bias):
    source = GPT(tiny(bias=bias), seed=4)
    save_model(source, tmp_path / "own", {})
    model = start_from(tmp_path / "own", tiny(bias=bias, block_size=6, dropout=0.1))
    assert torch.equal(model.wte.weight[:50], source.wte.weight[:50])
    assert torch.equal(model.wpe.weight, source.wpe.weight[:6])
    assert torch.equal(model.h[1].mlp.c_fc.weight, source.h[1].mlp.c_fc.weight)


def test_a_model_without_biases_comes_back_from_hugging_faces_form(tmp_path):
    source = GPT(tiny(), seed=4)
    save_hf(source, tmp_path / "hf")
    assert torch.equal(start_from(tmp_path / "hf", tiny()).h[0].ln_1.weight, source.h[0].ln_1.weight)


def test_other_weights_than_params_yaml_means_are_refused_with_the_hash_to_write(gpt2):
    _, folder = gpt2
    with pytest.raises(BadConfig, match=rf"init_sha256: found 0+, .* holds {folder_sha256(folder)}"):
        start_from(folder, tiny(bias=True, gelu="tanh"), sha256="0" * 64)


def test_a_shape_that_does_not_fit_is_refused_key_by_key(gpt2):
    _, folder = gpt2
    with pytest.raises(BadConfig) as caught:
        start_from(folder, tiny(bias=True, n_layer=3, block_size=16))
    for part in ("model.n_layer: found 3", "has 2", "model.gelu: found erf", "model.block_size: found 16"):
        assert part in str(caught.value)
    with pytest.raises(BadConfig, match=r"model\.bias: found false"):
        start_from(folder, tiny(gelu="tanh"))


def test_a_folder_that_is_not_there_is_refused_with_the_likely_reason(tmp_path):
    with pytest.raises(MissingInput, match="start from a copy"):
        start_from(tmp_path / "gone", tiny())


def test_the_hash_sees_weights_and_shape(gpt2):
    _, folder = gpt2
    before = folder_sha256(folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "n_head": 4}))
    assert folder_sha256(folder) != before


@pytest.mark.parametrize("change", [{"init_from": "models/base"}, {"init_sha256": "0" * 64}])
def test_a_folder_and_its_hash_are_given_together(change):
    with pytest.raises(ValueError, match="init_sha256"):
        recipe(**change)
