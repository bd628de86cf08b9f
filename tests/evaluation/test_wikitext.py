"""WikiText: windows of the published protocols, pages and spacing worked by hand, sums from all logits."""

import math

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.nn import functional as F

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.evaluation import wikitext
from compactgpt.evaluation.compact import as_neural_model
from tests.support.tiny_models import tiny_gpt

LINES = [
    "",
    " = The Hat = \n",
    "",
    " the cat , in the ( other ) hat . \n",
    " = = Then = = \n",
    " = A = \n",
    " in it \n",
]


def test_both_forms_give_the_same_lines(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES}), tmp_path / "a.parquet")
    (tmp_path / "a.raw").write_text("".join(line or " \n" for line in LINES))
    for name in ("a.parquet", "a.raw"):
        assert wikitext.read_lines(tmp_path / name) == LINES
    pyarrow.parquet.write_table(pyarrow.table({"words": LINES}), tmp_path / "b.parquet")
    with pytest.raises(BadData, match="is not WikiText"):
        wikitext.read_lines(tmp_path / "b.parquet")


def test_pages_open_with_titles_and_lose_their_spacing():
    first, second = wikitext.split_pages(LINES)
    assert first.startswith(" = The Hat = \n\n the cat")
    assert second == " = A = \n in it "
    assert wikitext.detokenize(first) == " = The Hat =\n\nthe cat, in the (other) hat.\n== Then == "
    found = wikitext.detokenize('dogs \' 1 @,@ 000 @.@ 5 [ a ] ; " b " at 3 ° N .')
    assert found == 'dogs\' 1,000.5 [a]; "b" at 3°N .'


@pytest.mark.parametrize(("length", "context", "stride"), [(20, 8, 8), (20, 8, 3), (17, 8, 4), (5, 8, 8)])
def test_blocks_are_those_of_transformers_perplexity_page(length, context, stride):
    """The page's own loop, with labels that the model shifts by one."""
    expected, before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        labels = [-100] * (end - begin - (end - before)) + list(range(before, end))
        scored = [label for label in labels[1:] if label != -100]
        expected.append((list(range(begin, end)), scored))
        before = end
        if end == length:
            break
    found = [(w.tokens.tolist(), w.targets.tolist()) for w in wikitext.blocks(range(length), context, stride)]
    assert found == [(fed[:-1], scored) for fed, scored in expected if scored]


def test_three_protocols_equal_plain_computations(encoding):
    model = tiny_gpt(encoding.n_vocab).double().eval()

    def nats(fed, targets):
        with torch.no_grad():
            logits = model.hidden(torch.tensor([fed]))[0] @ model.wte.weight[: encoding.n_vocab].T
        return F.cross_entropy(logits[-len(targets) :], torch.tensor(targets), reduction="sum").item()

    ids, total, count = encoding.encode_ordinary("\n\n".join(LINES)), 0.0, 0
    for start in range(0, len(ids), 12):
        block = ids[start : start + 12]
        if len(block) > 1:
            total, count = total + nats(block[:-1], block[1:]), count + len(block) - 1
    texts, page_nats = wikitext.split_pages(LINES), 0.0
    for text in texts:
        stream = [encoding.eot_token, *encoding.encode_ordinary(wikitext.detokenize(text))]
        for position in range(0, len(stream) - 1, 12):
            end = min(position + 12, len(stream) - 1)
            page_nats += nats(stream[max(0, end - 12) : end], stream[position + 1 : end + 1])
    found = wikitext.score_wikitext(as_neural_model(model.float(), 3, encoding), LINES, 12, 5)
    assert found["no_overlap"]["own_tokens"] == count
    assert found["no_overlap"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["strided"]["own_tokens"] == len(ids) - 1
    words = sum(len(text.split(" ")) + text.count("\n") for text in texts)
    assert found["per_word"]["bytes"] == sum(len(text) for text in texts)
    assert found["per_word"]["bits_per_byte"] == pytest.approx(
        page_nats / math.log(2) / found["per_word"]["bytes"], rel=1e-5
    )
    assert 0 < found["per_word"]["words"] <= words
    with pytest.raises(BadConfig, match="is above the context"):
        wikitext.score_wikitext(as_neural_model(model, 3, encoding), LINES, 12, 13)
