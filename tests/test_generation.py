"""Generation: it says what the model says, and its draws depend on seed and prompt only."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compactgpt import generation
from compactgpt.compact import compact
from compactgpt.config import Samples
from compactgpt.evaluation import Neural
from tests.tiny import save_tokenizer, tiny_gpt

SAMPLES = Samples(prompts=("the", "in a"), max_new_tokens=6, temperature=0.8, top_k=5, seed=3)


@pytest.fixture
def encoding(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def model(encoding):
    return tiny_gpt(encoding.n_vocab)


def successor(vocab_size: int, block_size: int = 4) -> Neural:
    """A model that always expects the id after the last one it was fed, and counts what it is fed."""

    def hidden(tokens):
        assert tokens.shape[1] <= block_size
        return F.one_hot((tokens + 1) % vocab_size, vocab_size).float()

    return Neural({}, hidden, 10 * torch.eye(vocab_size), block_size, 1)


def test_greedy_text_follows_the_model_and_stops_at_end_of_text():
    most_likely = generation._most_likely
    assert generation.generate(successor(20), [3, 4], 5, 19, most_likely) == [5, 6, 7, 8, 9]
    assert generation.generate(successor(20), [16], 5, 19, most_likely) == [17, 18]


def test_a_prompt_opens_a_document():
    """End-of-text is fed before it, as in generation."""
    assert generation.generate(successor(20), [], 3, 19, generation._most_likely) == [0, 1, 2]


def test_greedy_text_equals_recomputing_everything_for_each_token(model, encoding):
    prompt = encoding.encode_ordinary("the cat in")
    neural, tokens = compact(model, 1), [encoding.eot_token, *prompt]
    for _ in range(12):
        with torch.no_grad():
            logits = model.hidden(torch.tensor([tokens[-16:]]))[0, -1] @ model.wte.weight.T
        tokens.append(int(logits[: encoding.n_vocab].argmax()))
    found = generation.generate(neural, prompt, 12, encoding.eot_token, generation._most_likely)
    assert found == tokens[1 + len(prompt) :][: len(found)]
    assert len(found) == 12 or tokens[1 + len(prompt) + len(found)] == encoding.eot_token


def test_top_k_worked_by_hand():
    logits = np.log(np.array([1.0, 4.0, 2.0, 4.0]))
    found = generation.top_k_probabilities(logits, temperature=1.0, top_k=3)
    np.testing.assert_allclose(found, [0, 0.4, 0.2, 0.4])
    cooled = generation.top_k_probabilities(logits, temperature=0.5, top_k=4)
    np.testing.assert_allclose(cooled, np.array([1, 16, 4, 16]) / 37)
    np.testing.assert_allclose(generation.top_k_probabilities(logits, temperature=1.0, top_k=1), [0, 1, 0, 0])


def test_draws_follow_the_probabilities():
    samples = SAMPLES.model_copy(update={"temperature": 1.0, "top_k": 3})
    draw = partial(generation._drawn, generation.prompt_generator(1, "x"), samples)
    drawn = np.bincount([draw(np.log(np.array([1.0, 4.0, 2.0, 4.0]))) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(drawn / 4000, [0, 0.4, 0.2, 0.4], atol=0.03)


def test_a_prompts_sample_depends_on_seed_and_prompt_only(model, encoding):
    neural = compact(model, 1)

    def sampled(**changes):
        report = generation.sample_text(neural, encoding, SAMPLES.model_copy(update=changes))
        return {sample["prompt"]: sample["sampled"]["text"] for sample in report["samples"]}

    alone = sampled(prompts=("in a",))
    assert sampled()["in a"] == alone["in a"]
    assert sampled(prompts=("in a",), seed=4) != alone


def test_samples_are_readable_with_their_settings(model, encoding):
    page = generation.samples_markdown(generation.sample_text(compact(model, 1), encoding, SAMPLES))
    assert "temperature 0.8, top-k 5, seed 3" in page
    assert page.count("```") == 8
    assert "## in a" in page
