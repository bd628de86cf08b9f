"""Every word that a reader of the renderings meets, once in English and once in French.

TEXT holds sentences by key; VERDICTS and KNOWN the words of the record; PHRASES the record's own English
sentences in other languages. A phrase that is not there stays English.
"""

from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "fr"]
LANGUAGES: tuple[Language, ...] = ("en", "fr")

_EN: dict[str, str] = {
    "title": "The note's table, audited",
    "intro": "Made by `dvc repro` from reports/evidence.json, and from nothing else. The note's figures "
    "are quoted in its own language.",
    "tally": "Of the note's {number} claims: {counts}.",
    "table": "1. The note's table",
    "parameters": "Parameters",
    "perplexity": "Perplexity on OpenWebText (per GPT-2 token)",
    "context": "Context length (tokens)",
    "tokens": "Training tokens",
    "loss": "Loss (nats per token)",
    "compact": "The note's 30M model",
    "gpt2": "GPT-2 small",
    "gpt2_xl": "GPT-2 XL",
    "table_note": "The note's 30M model was not trained here. Where a figure of the compact demo stands in "
    "its column, it is from another, smaller model on another corpus, and decides nothing.",
    "measured": "2. What was measured here",
    "measured_note": "Every model saw the same {documents} documents of the val split ({tokens} GPT-2 "
    "tokens, {bytes} bytes), cut into windows of {window} tokens; the column *context* says what each one "
    "sees of them. Loss is in nats per GPT-2 token and perplexity per GPT-2 token, whatever the model's own "
    "tokenizer; bits per byte needs no tokenizer. Lower is better. Intervals are 95 %, from a bootstrap over "
    "documents; the ratio is the compact model's perplexity over that model's, paired by document.",
    "published_note": "Rows marked *published* are on other corpora, in windows of 1,024 tokens: their "
    "loss, perplexity and bits per byte are **not comparable** with the measured rows.",
    "model": "Model",
    "parameters_all": "Parameters, all",
    "parameters_non_embedding": "Parameters, non-embedding",
    "tokens_seen": "Tokens seen",
    "seen_context": "Context",
    "val_loss": "Loss",
    "val_perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "ratio": "Perplexity ratio",
    "known": "Known",
    "validation": "SHA-256 of the val split: `{sha256}`.",
    "forecast": "3. The loss expected, and the loss found",
    "expected": "Expected before training",
    "found": "Found",
    "80": "80 % interval",
    "95": "95 % interval",
    "inside": "inside",
    "outside": "outside",
    "basis": "Basis: {basis}.",
    "claims": "4. The note's claims",
    "claim": "Claim",
    "says": "The note says",
    "range": "Its range",
    "verdict": "Verdict",
    "because": "Because",
    "by_hand": "read by hand",
    "tasks": "5. Tasks, other views, flagged documents",
    "tasks_note": "Accuracies with Wilson's interval; p is McNemar's exact test of the compact model against "
    "that one on the same items. Flagged documents of the val split: {flagged} (reports/inspection.json).",
    "quantity": "Quantity",
    "p": "p",
    "text": "6. What the models wrote",
    "text_note": "Continuations of the beginnings of val documents, in GPT-2 tokens; human is how the "
    "documents go on. Formulas: `formulas` in reports/evaluation.json.",
    "way": "Way",
    "figure": "Figure",
    "samples": "7. Samples, side by side",
    "legend": "How a value is known",
    "known_measured": "**measured**: by this pipeline, on this machine.",
    "known_computed": "**computed**: follows from a configuration or an architecture.",
    "known_published": "**published**: by the source named in published.yaml.",
    "known_estimated": "**estimated**: written down before any run (reports/estimate.json). Decides nothing.",
    "known_reported": "**reported**: from somebody's public log. Decides nothing.",
    "legend_rule": "A value inside the claimed range *confirms* it (a count) or *supports* it; a disjoint "
    "one *contradicts* it; anything else is *inconclusive*. A verdict read by hand says so.",
    "demo": "demo",
    "colon": ": ",
    "none": "-",
    "at_least": "at least",
    "at_most": "at most",
    "to": "to",
    "step": "step",
    "train_loss_curve": "train",
    "val_loss_curve": "val",
    "band": "expected, 95 %",
    "band_80": "80 %",
    # the verdict, built by rule
    "sums": "Of the note's {number} claims, {parts}.",
    "and": "and",
    "holds": "{n} hold",
    "fails": "{n} do not",
    "open": "{n} cannot be decided",
    "waits": "{n} still wait for their experiment",
    "holds_1": "{n} holds",
    "fails_1": "{n} does not",
    "waits_1": "{n} still waits for its experiment",
    "central": "Its central guess, a perplexity of {quote} for its own model, {verdict}.",
    "central_decided": "is {verdict}: {found}",
    "central_estimate": "has not been measured; what we wrote down before any run, {found}, {relation}",
    "relation_below": "lies wholly below it",
    "relation_above": "lies wholly above it",
    "relation_inside": "lies inside it",
    "relation_overlaps": "overlaps it",
    # the page
    "kicker": "compactgpt · an audit",
    "other_language": "Français",
    "this_language": "English",
    "language": "Language",
    "page_table": "The note's table",
    "page_table_lead": "In large type what the note says; below it what is known, and the verdict. Point at "
    "a number, or tab to it, to see where it came from.",
    "page_demo": "What was trained and measured here",
    "page_demo_lead": "A demo: {parameters} parameters, {layers} layers of width {width}, {seen} tokens of "
    "{corpus}. It decides no claim about the note's model.",
    "page_curve": "Loss in training, and the interval written down before it",
    "page_curve_note": "The final loss on the whole val split is {found}: {inside_80} the 80 % interval, "
    "{inside_95} the 95 % interval. The curve itself is of part of that split.",
    "page_ratio": "Perplexity of the demo over that of each baseline",
    "page_ratio_note": "Left of 1 the demo predicts better, right of 1 the baseline does. The same documents "
    "for both; intervals of 95 % from a paired bootstrap over documents.",
    "page_bits": "Bits per byte",
    "page_bits_note": "Needs no tokenizer, so all models compare. Further left is better.",
    "page_positions": "Loss by place in the window",
    "page_positions_note": "How much a model gains from what stands before a token. In nats per token of "
    "each model's own tokenizer, so compare the shape, not the height.",
    "page_calibration": "How good was the estimate?",
    "page_calibration_note": "Thick: 80 % interval, thin: 95 %; both were written down before the run. The dot "
    "is what was then measured, a ring what others report, ticks what published scaling laws say as they stand. "
    "Rows below, if any: earlier runs, each foretold by the same rule from the rest.",
    "page_measured": "All models on the same text",
    "page_claims": "All claims",
    "page_claims_lead": "Each with its range, the verdict and the numbers that decided.",
    "page_samples": "What they write",
    "page_samples_lead": "The same prompts, one continuation a model and way of choosing tokens.",
    "page_data": "The data",
    "page_sources": "Where each number came from",
    "page_sources_lead": "Every value of the record, with the stage, the code and the data that made it. "
    "`compactgpt trace ID` goes on from here: to dvc.lock, the commit, and the MLflow run.",
    "page_colophon": "Made from reports/evidence.json and nothing else; `compactgpt verify` makes it anew and "
    "compares every byte.",
    "prompt": "Prompt",
    "greedy": "greedy",
    "top_k": "top-k",
    "nucleus": "nucleus",
    "human": "human",
    "corpus": "Corpus",
    "documents": "Documents",
    "bytes": "Bytes",
    "splits": "Splits",
    "split": "Split",
    "part": "Part",
    "licence": "Licence",
    "version": "Version",
    "left_out": "Left out",
    "checks": "Inspections passed",
    "tokenizer": "tokenizer",
    "flagged": "Documents of val that repeat training text",
    "id": "Id",
    "value": "Value",
    "unit": "Unit",
    "source": "Source",
    "stage": "Stage",
    "conditions": "Corpus, context, stride, tokenizer",
    "context_of": "context",
    "stride_of": "stride",
    "blank": "(only white space)",
    "page_repetition": "How much do they repeat themselves?",
    "page_repetition_note": "Share of a continuation's runs of four tokens that stood in it before, by way of "
    "choosing tokens. Human text is how the same documents go on.",
    "hashes": "SHA-256 of data, weights, code",
    "better": "← demo better",
    "worse": "baseline better →",
    "ratio_axis": "perplexity ratio, logarithmic",
    "position_axis": "place in the window (tokens)",
    "loss_axis": "nats per token",
    "own_tokens": "own tokens",
    "note_run": "the note's run",
    "demo_run": "the demo",
    "law": "law",
    "chart": "Chart",
    "skip": "Skip to the table",
    "top": "Contents",
}

_FR: dict[str, str] = {
    "title": "Le tableau de la note, vérifié",
    "intro": "Fait par `dvc repro` à partir de reports/evidence.json, et de rien d'autre.",
    "tally": "Des {number} affirmations de la note : {counts}.",
    "table": "1. Le tableau de la note",
    "parameters": "Paramètres",
    "perplexity": "Perplexité sur OpenWebText (par token GPT-2)",
    "context": "Longueur de contexte (tokens)",
    "tokens": "Tokens d'entraînement",
    "loss": "Loss (nats par token)",
    "compact": "Le modèle 30M de la note",
    "gpt2": "GPT-2 small",
    "gpt2_xl": "GPT-2 XL",
    "table_note": "Le modèle 30M de la note n'a pas été entraîné ici. Un chiffre de la démo dans sa colonne "
    "vient d'un autre modèle, plus petit, sur un autre corpus, et ne décide de rien.",
    "measured": "2. Ce qui a été mesuré ici",
    "measured_note": "Chaque modèle a vu les mêmes {documents} documents de la partie val ({tokens} tokens "
    "GPT-2, {bytes} octets), coupés en fenêtres de {window} tokens ; la colonne *contexte* dit ce que chacun "
    "en voit. La loss est en nats par token GPT-2 et la perplexité par token GPT-2, quel que soit le tokenizer "
    "du modèle ; les bits par octet n'en dépendent pas. Plus bas est mieux. Intervalles à 95 %, par bootstrap "
    "sur les documents ; le rapport est la perplexité du modèle compact divisée par celle de l'autre, document "
    "par document.",
    "published_note": "Les lignes *publié* portent sur d'autres corpus, en fenêtres de 1024 tokens : leur loss, "
    "leur perplexité et leurs bits par octet **ne se comparent pas** aux lignes mesurées.",
    "model": "Modèle",
    "parameters_all": "Paramètres, tous",
    "parameters_non_embedding": "Paramètres, hors embeddings",
    "tokens_seen": "Tokens vus",
    "seen_context": "Contexte",
    "val_loss": "Loss",
    "val_perplexity": "Perplexité",
    "bits_per_byte": "Bits par octet",
    "ratio": "Rapport de perplexité",
    "known": "Connu",
    "validation": "SHA-256 de la partie val : `{sha256}`.",
    "forecast": "3. La loss attendue et la loss trouvée",
    "expected": "Attendue avant l'entraînement",
    "found": "Trouvée",
    "80": "intervalle à 80 %",
    "95": "intervalle à 95 %",
    "inside": "dans",
    "outside": "hors de",
    "basis": "Base : {basis}.",
    "claims": "4. Les affirmations de la note",
    "claim": "N°",
    "says": "La note dit",
    "range": "Son intervalle",
    "verdict": "Verdict",
    "because": "Parce que",
    "by_hand": "lu à la main",
    "tasks": "5. Tâches, autres vues, documents signalés",
    "tasks_note": "Exactitudes avec l'intervalle de Wilson ; p est le test exact de McNemar du modèle compact "
    "contre l'autre sur les mêmes questions. Documents signalés de la partie val : {flagged} "
    "(reports/inspection.json).",
    "quantity": "Grandeur",
    "p": "p",
    "text": "6. Ce que les modèles ont écrit",
    "text_note": "Suites de débuts de documents de la partie val, en tokens GPT-2 ; humain : la vraie suite. "
    "Formules : `formulas` dans reports/evaluation.json.",
    "way": "Façon",
    "figure": "Mesure",
    "samples": "7. Exemples, côte à côte",
    "legend": "Comment une valeur est connue",
    "known_measured": "**mesuré** : par cette chaîne, sur cette machine.",
    "known_computed": "**calculé** : suit d'une configuration ou d'une architecture.",
    "known_published": "**publié** : par la source nommée dans published.yaml.",
    "known_estimated": "**estimé** : écrit avant tout entraînement (reports/estimate.json). Ne décide de rien.",
    "known_reported": "**rapporté** : tiré du journal public de quelqu'un. Ne décide de rien.",
    "legend_rule": "Une valeur dans l'intervalle annoncé le *confirme* (un compte) ou le *soutient* ; une valeur "
    "disjointe le *contredit* ; le reste est *indécis*. Un verdict lu à la main le dit.",
    "demo": "démo",
    "colon": " : ",
    "none": "-",
    "at_least": "au moins",
    "at_most": "au plus",
    "to": "à",
    "step": "pas",
    "train_loss_curve": "train",
    "val_loss_curve": "val",
    "band": "attendu, 95 %",
    "band_80": "80 %",
    "sums": "Des {number} affirmations de la note, {parts}.",
    "and": "et",
    "holds": "{n} tiennent",
    "fails": "{n} ne tiennent pas",
    "open": "{n} ne peuvent être tranchées",
    "waits": "{n} attendent encore leur expérience",
    "holds_1": "{n} tient",
    "fails_1": "{n} ne tient pas",
    "open_1": "{n} ne peut être tranchée",
    "waits_1": "{n} attend encore son expérience",
    "central": "Sa prévision centrale, une perplexité de {quote} pour son propre modèle, {verdict}.",
    "central_decided": "est jugée ainsi : {verdict} ({found})",
    "central_estimate": "n'a pas été mesurée ; ce que nous avons écrit avant tout entraînement, {found}, "
    "{relation}",
    "relation_below": "est entièrement en dessous",
    "relation_above": "est entièrement au-dessus",
    "relation_inside": "est dedans",
    "relation_overlaps": "la recouvre en partie",
    "kicker": "compactgpt · une vérification",
    "other_language": "English",
    "this_language": "Français",
    "language": "Langue",
    "page_table": "Le tableau de la note",
    "page_table_lead": "En grand, ce que dit la note ; en dessous, ce que l'on sait, et le verdict. Pointez un "
    "nombre, ou allez-y au clavier, pour voir d'où il vient.",
    "page_demo": "Ce qui a été entraîné et mesuré ici",
    "page_demo_lead": "Une démo : {parameters} paramètres, {layers} couches de largeur {width}, {seen} tokens de "
    "{corpus}. Elle ne décide d'aucune affirmation sur le modèle de la note.",
    "page_curve": "La loss pendant l'entraînement, et l'intervalle écrit avant",
    "page_curve_note": "La loss finale sur toute la partie val est de {found} : {inside_80} l'intervalle à 80 %, "
    "{inside_95} l'intervalle à 95 %. La courbe ne porte que sur un bout de cette partie.",
    "page_ratio": "Perplexité de la démo rapportée à celle de chaque référence",
    "page_ratio_note": "À gauche de 1 la démo prédit mieux, à droite la référence. Les mêmes documents pour les "
    "deux ; intervalles à 95 % par bootstrap apparié sur les documents.",
    "page_bits": "Bits par octet",
    "page_bits_note": "Ne dépend d'aucun tokenizer : tous les modèles se comparent. Plus à gauche est mieux.",
    "page_positions": "La loss selon la place dans la fenêtre",
    "page_positions_note": "Ce qu'un modèle gagne à connaître ce qui précède. En nats par token du tokenizer de "
    "chaque modèle : comparez la forme, pas la hauteur.",
    "page_calibration": "L'estimation était-elle bonne ?",
    "page_calibration_note": "Épais : intervalle à 80 %, fin : 95 % ; les deux ont été écrits avant. Le point est "
    "ce qui fut mesuré ensuite, l'anneau ce que d'autres rapportent, les traits ce que disent telles quelles les "
    "lois d'échelle publiées. Plus bas, s'il y en a : des runs antérieurs, chacun prédit par la même règle d'après les autres.",
    "page_measured": "Tous les modèles sur le même texte",
    "page_claims": "Toutes les affirmations",
    "page_claims_lead": "Chacune avec son intervalle, le verdict et les nombres qui ont décidé.",
    "page_samples": "Ce qu'ils écrivent",
    "page_samples_lead": "Les mêmes débuts, une suite par modèle et par façon de choisir les tokens.",
    "page_data": "Les données",
    "page_sources": "D'où vient chaque nombre",
    "page_sources_lead": "Toutes les valeurs, avec l'étape, le code et les données qui les ont faites. "
    "`compactgpt trace ID` remonte plus loin : à dvc.lock, au commit et au run MLflow.",
    "page_colophon": "Fait à partir de reports/evidence.json et de rien d'autre ; `compactgpt verify` refait tout "
    "et compare chaque octet.",
    "prompt": "Début",
    "greedy": "glouton",
    "top_k": "top-k",
    "nucleus": "nucleus",
    "human": "humain",
    "corpus": "Corpus",
    "documents": "Documents",
    "bytes": "Octets",
    "splits": "Parties",
    "split": "Partie",
    "part": "Source",
    "licence": "Licence",
    "version": "Version",
    "left_out": "Écartés",
    "checks": "Contrôles réussis",
    "tokenizer": "tokenizer",
    "flagged": "Documents de val qui répètent du texte d'entraînement",
    "id": "Nom",
    "value": "Valeur",
    "unit": "Unité",
    "source": "Source",
    "stage": "Étape",
    "conditions": "Corpus, contexte, décalage, tokenizer",
    "context_of": "contexte",
    "stride_of": "décalage",
    "blank": "(rien que des blancs)",
    "page_repetition": "Se répètent-ils ?",
    "page_repetition_note": "Part des suites de quatre tokens d'un texte qui y figuraient déjà, selon la façon de "
    "choisir les tokens. Humain : la vraie suite des mêmes documents.",
    "hashes": "SHA-256 des données, des poids, du code",
    "better": "← démo meilleure",
    "worse": "référence meilleure →",
    "ratio_axis": "rapport de perplexité, logarithmique",
    "position_axis": "place dans la fenêtre (tokens)",
    "loss_axis": "nats par token",
    "own_tokens": "ses tokens",
    "note_run": "le run de la note",
    "demo_run": "la démo",
    "law": "loi",
    "chart": "Graphique",
    "skip": "Aller au tableau",
    "top": "Sommaire",
}

TEXT: dict[Language, dict[str, str]] = {"en": _EN, "fr": _FR}

# The groups of the verdict sentence.
GROUPS: dict[str, tuple[str, ...]] = {
    "holds": ("confirmed", "supported"),
    "fails": ("contradicted", "self-inconsistent", "misleading"),
    "open": ("inconclusive", "unverifiable"),
    "waits": ("not yet measured",),
}

VERDICTS: dict[str, str] = {
    "confirmed": "confirmé",
    "supported": "soutenu",
    "contradicted": "contredit",
    "inconclusive": "indécis",
    "self-inconsistent": "contradictoire en soi",
    "misleading": "trompeur",
    "unverifiable": "invérifiable",
    "not yet measured": "pas encore mesuré",
}
KNOWN: dict[str, str] = {
    "measured": "mesuré",
    "computed": "calculé",
    "published": "publié",
    "estimated": "estimé",
    "reported": "rapporté",
}
UNITS: dict[str, str] = {
    "parameters": "paramètres",
    "sequences": "séquences",
    "nats per token": "nats par token",
    "bits per byte": "bits par octet",
    "bytes per token": "octets par token",
    "ratio": "rapport",
    "perplexity": "perplexité",
    "share": "part",
    "coefficient": "coefficient",
    "probability": "probabilité",
}
PHRASES: dict[str, str] = {
    "the corpus is docstrings, for which no law is calibrated": "le corpus est docstrings, pour lequel aucune loi n'est calée",
    "the window of the document": "la fenêtre du document",
    "nothing": "rien",
    "the document before": "le début du document",
    "the paper gives 40 GB of text, about 9.1 billion tokens, and no number of epochs": "l'article donne 40 Go "
    "de texte, environ 9,1 milliards de tokens, et aucun nombre d'époques",
    "the paper gives 40 GB of text (gigabytes, not billions of tokens) and no number of epochs": "l'article "
    "donne 40 Go de texte (des gigaoctets, non des milliards de tokens) et aucun nombre d'époques",
    "no such figure is published; the nearest is GPT-2 small against itself fine-tuned on OpenWebText, a "
    "larger gap": "aucun chiffre de ce genre n'est publié ; le plus proche est GPT-2 small contre lui-même "
    "affiné sur OpenWebText, un écart plus grand",
    "that figure is its zero-shot score on Penn Treebank, which is not its own set": "ce chiffre est son score "
    "zero-shot sur Penn Treebank, qui n'est pas son propre jeu",
    "the paper prints no such number and WebText is not public; its WikiText-103 score falls in the "
    "range": "l'article n'imprime pas ce nombre et WebText n'est pas public ; son score sur WikiText-103 tombe "
    "dans l'intervalle",
    "one forum post: tokenizer, split and windows are not given": "un message de forum : ni tokenizer, ni "
    "découpage, ni fenêtres ne sont donnés",
    "WikiText-103 is scored in perplexity; it has no accuracy": "WikiText-103 se mesure en perplexité ; il n'a "
    "pas d'exactitude",
    "it ends lower than GPT-2 as released and level with GPT-2 fine-tuned: the corpora differ": "elle finit plus "
    "bas que GPT-2 tel que publié et au niveau de GPT-2 affiné : les corpus diffèrent",
    "cosine decay is nanoGPT's default (decay_lr = True in train.py)": "la décroissance cosinus est le défaut de "
    "nanoGPT (decay_lr = True dans train.py)",
    "nanoGPT has no eval.py; `train.py config/eval_gpt2.py` does it, on random windows": "nanoGPT n'a pas "
    "d'eval.py ; `train.py config/eval_gpt2.py` le fait, sur des fenêtres tirées au hasard",
    "the note's own table says 8 to 40 billion": "le tableau de la note dit 8 à 40 milliards",
    "WebText was never released, and no measure of quality is named": "WebText n'a jamais été publié, et aucune "
    "mesure de qualité n'est nommée",
    "nanoGPT's blocks have the same: norms before each part and one at the end": "les blocs de nanoGPT ont les "
    "mêmes : une norme avant chaque partie et une à la fin",
    "the laws are extrapolated far below the sizes and budgets that they were fitted on": "les lois sont "
    "extrapolées loin en dessous des tailles et budgets sur lesquels elles ont été ajustées",
}


def text(language: Language, key: str) -> str:
    """One sentence or word of ours."""
    return TEXT[language][key]


def translated(language: Language, word: str, table: Mapping[str, str]) -> str:
    """A word of the record, in the reader's language where there is one for it."""
    return word if language == "en" else table.get(word, word)
