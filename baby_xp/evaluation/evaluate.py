"""What can be measured of a run, each figure named for what it measures: no marks out of a hundred."""

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from baby_xp_data import equations as known

from baby_xp import equations, layout
from baby_xp.config import RunConfig
from baby_xp.evaluation import text_metrics
from baby_xp.run import Run
from baby_xp.runs import store
from baby_xp.text import dataset
from baby_xp.text.batches import Batch
from baby_xp.text.tokenizer import Tokenizer
from baby_xp.training.step import total_loss
from baby_xp.training.validation import mean_loss

CHUNK = 1 << 16
NGRAM = 8


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Losses are means over the whole validation part.

    loss is in nats per token, bits_per_character in bits, perplexity is exp(loss). entropy is the exact entropy of
    the text in nats per character, where that is known: no model can go below it. known_words and copied_ngrams
    are shares of `num_tokens` generated tokens, see quality.py. accuracy is the share of validation targets that
    are the model's most likely token. answered is the share of held-out equations answered correctly, for a
    run that learns equations.
    """

    data: str
    tokens: int
    loss: float
    perplexity: float
    accuracy: float
    bits_per_character: float | None = None
    entropy: float | None = None
    num_tokens: int = 0
    known_words: float | None = None
    copied_ngrams: float | None = None
    ngram: int = NGRAM
    answered: float | None = None

    def lines(self) -> list[str]:
        """The figures as a table for people."""
        rows = [
            ("text", self.data),
            ("validation tokens", f"{self.tokens:,}"),
            ("loss", f"{self.loss:.4f} nats per token"),
            ("perplexity", f"{self.perplexity:.3f}"),
            ("next-token accuracy", f"{self.accuracy:.1%}"),
        ]
        if self.answered is not None:
            rows.append(("held-out equations answered correctly", f"{self.answered:.1%}"))
        if self.bits_per_character is not None:
            rows.append(("bits per character", f"{self.bits_per_character:.4f}"))
        if self.entropy is not None:
            above = f"{self.loss - self.entropy:.4f} nats above {self.entropy:.4f}, the exact entropy of the text"
            rows.append(("distance to the best possible", above))
        shares = {
            "words that occur in the training text": self.known_words,
            f"{self.ngram}-character sequences copied from it": self.copied_ngrams,
        }
        rows += [(f"of {self.num_tokens:,} generated tokens:", "")] if self.num_tokens else []
        rows += [(f"  {name}", f"{share:.1%}") for name, share in shares.items() if share is not None]
        return layout.pairs(rows)


def evaluate(run: Run, chosen: RunConfig, sha256: str | None, num_tokens: int, seed: int) -> Evaluation:
    """Measure a run on the text of `chosen`, which must hash to `sha256` unless that is None.

    Raises BabyError if the text cannot serve.
    """
    learned = dataset.prepare(
        chosen.data, chosen.model, chosen.train, store.folder_for_ids(run.files), run.tokenizer, sha256
    )
    loss, accuracy = _measure(run, learned.validation())
    found = Evaluation(learned.name, learned.n_validation, loss, math.exp(min(loss, 700)), accuracy)
    if learned.corpus is None:
        return replace(found, answered=_answered(run, chosen))
    train, validation = learned.corpus.train, learned.corpus.validation
    per_character = len(validation) / max(1, sum(map(len, _text(run.tokenizer, validation))))
    text = run.generate(num_tokens=num_tokens, seed=seed)
    return replace(
        found,
        bits_per_character=loss * per_character / math.log(2),
        entropy=learned.facts.get("entropy, nats per character"),
        num_tokens=num_tokens,
        known_words=text_metrics.known_words(text, _text(run.tokenizer, train)),
        copied_ngrams=text_metrics.copied_ngrams(text, _text(run.tokenizer, train), NGRAM),
    )


def _measure(run: Run, batches: Iterator[Batch]) -> tuple[float, float]:
    """Mean loss in nats per target, and the share of targets that are the most likely token."""
    backend, right, targets = run.backend, 0, 0
    xp, params = backend.xp, backend.asarray(run.params)

    def compute(params: Any, batch: Batch) -> Any:
        logits, _ = run.model.forward(xp, run.model.layout.unpack(xp, params), batch.inputs)
        return total_loss(xp, run.model, params, batch), xp.argmax(logits, axis=-1)

    compiled = backend.compile(compute)

    def total(batch: Batch) -> float:
        nonlocal right, targets
        loss, likeliest = compiled(params, Batch(*(backend.asarray(part) for part in batch)))
        right += int(np.sum(backend.to_numpy(likeliest) == batch.targets.reshape(-1)))
        targets += batch.targets.size
        return float(backend.to_numpy(loss)[0])

    with np.errstate(all="ignore"):
        loss = mean_loss(total, batches)
    return loss, right / targets


def _answered(run: Run, chosen: RunConfig) -> float:
    """The share of held-out equations that a run answers correctly."""
    data, weights = chosen.data, run.model.layout.unpack(np, run.params)
    table = {"digits": data.digits, "operators": data.operators}
    held_out = known.chosen(data.held_out, chosen.train.seed, data.max_sum, **table)
    asked = known.held_out_equations(data.max_sum, held_out, **table)
    return float(np.mean(equations.answers(weights, asked, run.model.config, data.digits)[0]))


def _text(tokenizer: Tokenizer, ids: np.ndarray) -> Iterator[str]:
    """The text of ids (n,), in chunks."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for first in range(0, len(ids), CHUNK):
        piece = ids[first : first + CHUNK]
        is_bytes = tokenizer.kind == "byte"
        yield decoder.decode(piece.astype(np.uint8).tobytes()) if is_bytes else tokenizer.decode(piece)
