"""Evaluating a trained model: several metrics, and no overall score."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from baby_xp import layout
from baby_xp.inference.trained_model import TrainedModel
from baby_xp.text.batches import Batch
from baby_xp.text.dataset import Dataset
from baby_xp.text.text_metrics import NGRAM
from baby_xp.training.step import loss_and_predictions
from baby_xp.training.validation import mean_loss


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Losses are means over the whole validation part.

    loss is in nats per token, bits_per_character in bits, perplexity is exp(loss). entropy is the exact entropy of
    the text in nats per character, if it is known: no model can go below it. known_words and copied_ngrams
    are shares of `num_tokens` generated tokens, see text_metrics.py. accuracy is the share of validation targets
    that are the model's most likely token. answered is the share of held-out equations answered correctly, for a
    model of equations.
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
    answered: float | None = None

    def lines(self) -> list[str]:
        """The figures as a table for people."""
        rows = [
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
            f"{NGRAM}-character sequences copied from it": self.copied_ngrams,
        }
        rows += [(f"of {self.num_tokens:,} generated tokens:", "")] if self.num_tokens else []
        rows += [(f"  {name}", f"{share:.1%}") for name, share in shares.items() if share is not None]
        return layout.pairs([("text", self.data), *rows])


def evaluate(trained: TrainedModel, dataset: Dataset, num_tokens: int, seed: int) -> Evaluation:
    """Measure a trained model on the whole validation part of a dataset. num_tokens are generated, with `seed`."""
    loss, accuracy = _measure(trained, dataset.validation())
    perplexity, more = math.exp(min(loss, 700)), dataset.score(trained, loss, num_tokens, seed)
    return Evaluation(
        dataset.name, dataset.n_validation, loss, perplexity, accuracy, entropy=dataset.entropy, **more
    )


def _measure(trained: TrainedModel, batches: Iterator[Batch]) -> tuple[float, float]:
    """Mean loss in nats per target, and the share of targets that are the most likely token."""
    backend, model, right, n_targets = trained.backend, trained.model, 0, 0
    xp, params = backend.xp, backend.asarray(trained.params)
    compiled = backend.compile(lambda params, batch: loss_and_predictions(xp, model, params, batch))

    def total(batch: Batch) -> float:
        nonlocal right, n_targets
        loss, predictions = compiled(params, Batch(*(backend.asarray(part) for part in batch)))
        right += int(np.sum(backend.to_numpy(predictions) == batch.targets.reshape(-1)))
        n_targets += batch.targets.size
        return float(backend.to_numpy(loss)[0])

    with np.errstate(all="ignore"):
        loss = mean_loss(total, batches)
    return loss, right / n_targets
