"""Generated text is what the model says, with and without a cache; draws depend on seed and prompt only."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from markdown_it import MarkdownIt

from compactgpt.common.errors import BadConfig
from compactgpt.config import Text
from compactgpt.evaluation import generation
from compactgpt.evaluation.baselines import make_decoder
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import NeuralModel
from tests.support.tiny_models import TEXTS, save_split

TEXT = Text(
    prompts=("the", "in a"), documents=2, prompt_tokens=4, max_new_tokens=6, temperature=0.8, top_k=5,
    top_p=0.9, batch_size=4, seed=3,
)  # fmt: skip
END = 2
PROMPTS = [[3, 250, 17], [40], [60, 61, 62, 63, 64, 65, 66]]


def greedy(logits):
    return int(logits.argmax())


def write(model, prompts, max_new_tokens, choose=greedy):
    """Return the new tokens of each prompt, with END at the end of a text and None after it."""
    steps = generation.generate_tokens(model, prompts, [choose] * len(prompts), max_new_tokens, END)
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("choose", [greedy, lambda logits: int(np.argsort(logits)[-2])])
@pytest.mark.parametrize("new_tokens", [9, 12])  # all fits the context of 16; or the beginning is lost
def test_continuations_with_and_without_a_cache_equal_a_plain_loop(model, choose, new_tokens):
    """Prompts of different lengths at once; the reference reads everything again, one text at a time."""
    neural = as_neural_model(model, 1)
    found = write(neural, PROMPTS, new_tokens, choose)
    for prompt, row in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + new_tokens and tokens[-1] != END:
            with torch.no_grad():
                logits = neural.head @ model.hidden(torch.tensor([tokens[-16:]]))[0, -1]
            tokens.append(choose(logits.numpy()))
        assert [token for token in row if token is not None] == tokens[len(prompt) :]
    plain = replace(neural, decoder=None)
    assert write(plain, PROMPTS, new_tokens, choose) == found


@pytest.mark.parametrize("kind", ["GPT2Config", "LlamaConfig", "BloomConfig"])
def test_models_of_transformers_write_the_same_with_their_cache(kind):
    torch.manual_seed(1)
    config = getattr(transformers, kind)(
        vocab_size=50, bos_token_id=1, eos_token_id=1, initializer_range=0.4, hidden_size=16,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def hidden(tokens):
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    head = model.get_output_embeddings().weight.detach()
    decoder = make_decoder(model)
    assert (decoder is None) == (kind == "BloomConfig")  # which takes no positions
    plain = NeuralModel({}, hidden, head, 32, 1)
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10]]
    assert write(replace(plain, decoder=decoder), prompts, 12) == write(plain, prompts, 12)


def test_top_k_and_nucleus_worked_by_hand():
    logits = np.log(np.array([1.0, 4.0, 2.0, 4.0]))
    cases = [(1.0, 3, [0, 0.4, 0.2, 0.4]), (1.0, 1, [0, 1, 0, 0]), (0.5, 4, np.array([1, 16, 4, 16]) / 37)]
    for temperature, top_k, expected in cases:
        found = generation.top_k_probabilities(logits, temperature=temperature, top_k=top_k)
        np.testing.assert_allclose(found, expected)
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    for top_p, expected in {0.4: [0, 1, 0, 0], 0.7: [0, 2 / 3, 0, 1 / 3], 1.0: np.exp(logits)}.items():
        np.testing.assert_allclose(generation.nucleus_probabilities(logits, top_p=top_p), expected)
    flat = generation.nucleus_probabilities(np.zeros(200_000), top_p=0.5)  # all unlikely: 5e-6 each
    assert np.count_nonzero(flat) == pytest.approx(100_000, abs=1)


def test_a_prompts_text_depends_on_seed_and_prompt_only(model, encoding, split):
    def generate(**changes):
        neural = as_neural_model(model, 1, encoding)
        report = generation.generate_texts(neural, split, encoding, TEXT.model_copy(update=changes))
        return {
            one["prompt"]: [one[name]["text"] for name in generation.STRATEGIES] for one in report["samples"]
        }

    alone = generate(prompts=("in a",))["in a"]
    assert generate()["in a"] == alone
    assert generate(batch_size=100) == generate()
    reseeded = generate(seed=4)["in a"]
    assert reseeded[0] == alone[0]
    assert reseeded[1:] != alone[1:]


def test_documents_are_continued_beside_their_own_human_text(tmp_path, model, encoding, split):
    prompts, human = generation.choose_prompts(TEXT, split, encoding)
    assert [each["prompt"] for each in prompts[:2]] == ["the", "in a"]
    for each, following in zip(prompts[2:], human, strict=True):
        document = split.document_ids.index(each["document"])
        assert TEXTS[document].startswith(each["prompt"])
        assert following == split.document(document)[4:10].tolist()
    report = generation.generate_texts(as_neural_model(model, 1, encoding), split, encoding, TEXT)
    assert report["statistics"]["human"]["tokens"]["value"] == 6
    assert report["statistics"]["greedy"]["loop_rate"]["high"] <= 1
    page = generation.samples_markdown(report)
    assert "5 most probable tokens at temperature 0.8. *nucleus* uses top-p 0.9. The random seed is 3" in page
    assert (page.count("```"), page.count("## ")) == (12, 2)
    short = save_split(tmp_path / "short.tokens", encoding, texts=["a", "b"])
    with pytest.raises(BadConfig, match="has 0 documents of at least 10 tokens"):
        generation.choose_prompts(TEXT, short, encoding)


def test_samples_keep_hostile_text_as_text():
    hostile = {"text": "```\n<b>\u202e\x1b[31m\n# no heading\n", "tokens": 3}
    sample = {"prompt": "*a*\n<script>", "document": None, **dict.fromkeys(generation.STRATEGIES, hostile)}
    settings = {"max_new_tokens": 3, "top_k": 5, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    page = generation.samples_markdown({"settings": settings, "samples": [sample]})
    rendered = MarkdownIt("commonmark").render(page)
    assert set(re.findall(r"<(\w+)", rendered)) == {"h1", "h2", "p", "em", "pre", "code"}
    assert "<h2>*a*\\n&lt;script&gt;</h2>" in rendered
    assert not re.search("[\u202e\x1b]", page)
