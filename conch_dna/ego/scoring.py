"""Log-probabilities of texts, token by token, under a model.

Knows a loaded model and tokenized examples; nothing of prompts, EGO's settings or files.
To add a figure of a text: a field or property of `TextScore`, filled here.
"""

from collections.abc import Sequence

from conch_dna.ego.settings import TextScore
from conch_dna.language_model import LanguageModel
from conch_dna.training.batches import Example
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes
from conch_dna.training.evaluation import token_scores


def score_examples(
    model: LanguageModel, examples: Sequence[Example], *, batch_size: int, chunk: int = 1024
) -> list[TextScore]:
    """Score the counted tokens of every example, at temperature 1.

    Args:
        model: Loaded.
        examples: With at least one counted token each.
        batch_size: Examples at once.
        chunk: Tokens whose logits exist at once.

    Returns:
        Scores in the order of the examples.

    Raises:
        ConchError: The tokenizer does not list its tokens.
    """
    texts = token_bytes(model.tokenizer).texts
    scores = token_scores(model, examples, batch_size=batch_size, chunk=chunk)
    found = []
    for example, score in zip(examples, scores, strict=True):
        ids = example.ids[example.counted].tolist()
        found.append(
            TextScore(
                token_ids=tuple(ids),
                log_probs=tuple(score.log_probs.tolist()),
                pieces=tuple(texts[token] for token in ids),
                text_bytes=example.text_bytes,
            )
        )
    return found
