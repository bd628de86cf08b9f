"""Both languages say the same, and the templates hold all that the reports say."""

import re
from typing import get_args

from compactgpt.common.sections import load_section
from compactgpt.experiments import find_experiment
from compactgpt.forecast.estimate import estimate
from compactgpt.reporting.claims import Claims, Known, Verdict
from compactgpt.reporting.templating import TEMPLATES, load_messages, translate
from tests.support.comparison_inputs import PARAMS, ROOT

RENDERING = ("pages", "plots", "tables", "templating")
MODULES = [ROOT / f"src/compactgpt/reporting/{name}.py" for name in RENDERING]


def test_both_languages_have_the_same_keys_and_placeholders():
    english, french = (load_messages(language) for language in ("en", "fr"))
    assert list(english["text"]) == list(french["text"])
    assert set(get_args(Verdict)) == set(french["verdicts"])
    assert set(get_args(Known)) == set(french["known"])
    for key, message in english["text"].items():
        assert sorted(re.findall(r"{\w*}", message)) == sorted(re.findall(r"{\w*}", french["text"][key])), key


def test_every_message_is_used():
    source = "".join(path.read_text("utf-8") for path in [*MODULES, *TEMPLATES.glob("*.j2")])
    # whose keys are put together, or come from the record
    built = r"known_|own_(better|worse|level)|(holds|repeats|fails|open|waits)(_1)?$|page_\w+_note$"
    built += r"|\w+_of$|context_(matched|own|both)$|small_(same_way|other_way|no_effect_found)$"
    built += r"|(greedy|top_k|nucleus)$|(train|val)_loss_curve$|page_(table|data|samples|claims|sources)$"
    built += r"|page_(curve|ratio|bits|positions|calibration|repetition)$|val_(hash|tail)$"
    words = [key for key in load_messages("en")["text"] if not re.match(built, key)]
    assert [key for key in words if not re.search(rf"\b{key}\b", source)] == []


def test_every_sentence_of_the_record_has_a_translation():
    claims = load_section(ROOT / "claims.yaml", Claims).claims
    sentences = [c.judged.reason for c in claims if c.judged.reason]
    sentences += estimate(PARAMS)["compact"]["notes"]
    small = find_experiment("small-scale", ROOT / "conf")
    for compared in (*small.comparisons, *small.texts):
        sentences += [compared.quantity, compared.otherwise]
    assert len(sentences) >= 15
    assert [one for one in sentences if translate("fr", "phrases", one) == one] == []
    assert [one for one in sentences if translate("en", "phrases", one) != one] == []


def test_a_sentence_with_a_name_in_it_is_translated_around_the_name():
    sentence = "the corpus is {0} <b>, for which no law is calibrated"
    assert translate("fr", "phrases", sentence) == "le corpus est {0} <b>, pour lequel aucune loi n'est calée"
    assert translate("fr", "phrases", "something else") == "something else"
