"""A small tokenizer built as T5's is, for tests of encoder–decoders."""

import json
from functools import cache
from typing import Any

NOT_IN_T5 = "<{}~\\"  # printable characters that T5's vocabulary lacks: each becomes <unk>
WORDS = (
    "Ann Ben The train farmer She He has had buys sells eats drives gets boxes of apples eggs km clips in for each "
    "a an and is are left them then so So How many does she it week hours total now"
)
SIGNS = "= + - * / // ( ) [ # ####"


@cache
def t5_tokenizer() -> Any:
    """Return transformers' `T5Tokenizer` with a small vocabulary, always the same; copy it to change it.

    As in T5: no piece has a space inside, line feeds are spaces, `</s>` (id 1) ends a text, <pad> is 0 and <unk> 2,
    and 100 extra ids come last. It knows the printable ASCII characters but `NOT_IN_T5`, words, and numbers up to 144.
    Some pieces cross the end of an annotation (`▁24]`).
    """
    from transformers import T5Tokenizer

    numbers = [*map(str, range(145)), "-2", "0.25", "4.50"]
    pieces = {
        **dict.fromkeys((chr(i) for i in range(33, 127) if chr(i) not in NOT_IN_T5), -10.0),
        **dict.fromkeys(numbers, -8.0),
        "▁": -4.0,
        **{"▁" + word: -6.0 for word in (*WORDS.split(), *numbers)},
        **{"▁" + sign: -4.0 for sign in SIGNS.split()},
        "]": -3.0,
        **dict.fromkeys(("▁24]", "▁-2]", "2]", "▁[5", "]."), -7.0),
    }
    special = dict.fromkeys(("<pad>", "</s>", "<unk>"), 0.0)
    extra = {f"<extra_id_{i}>": 0.0 for i in reversed(range(100))}
    return T5Tokenizer(vocab=[*special.items(), *pieces.items(), *extra.items()])


def trained_t5_tokenizer(texts: list[str]) -> Any:
    """Return a `T5Tokenizer` whose pieces are trained on texts, hardly the same twice."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import T5Tokenizer

    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = T5Tokenizer().backend_tokenizer.pre_tokenizer
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    model.train_from_iterator(texts, trainer)
    pieces = {piece: score for piece, score in json.loads(model.to_str())["model"]["vocab"] if piece not in special}
    return T5Tokenizer(vocab=[*dict.fromkeys(special, 0.0).items(), *pieces.items()], extra_ids=0)
