"""A run in memory: a trained model that generates."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baby_xp.backend import Backend
from baby_xp.config import settings_of
from baby_xp.errors import BabyError
from baby_xp.generate import Sampling, generate, generate_several
from baby_xp.models import Model
from baby_xp.runs.store import RunFiles
from baby_xp.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from baby_xp.evaluation import Evaluation

NUM_TOKENS = 500
"""Tokens to generate where nothing else is said."""


@dataclass(frozen=True)
class Run:
    """A trained model with its tokenizer and its files."""

    files: RunFiles
    model: Model
    tokenizer: Tokenizer
    params: np.ndarray
    """The parameters (P,), on the host."""
    config: dict[str, Any]
    """The run's config file."""
    backend: Backend

    @property
    def guid(self) -> str:
        """The run's GUID."""
        return self.files.guid

    def generate(
        self, prompt: str = "", num_tokens: int = NUM_TOKENS, use_cache: bool = True, **sampling: Any
    ) -> str:
        """The prompt and its continuation. `sampling`: temperature, top_k, top_p, greedy, seed.

        Raises BabyError for a prompt that the tokenizer cannot encode, or a setting that makes no sense.
        """
        return prompt + "".join(self.stream(prompt, num_tokens, use_cache, **sampling))

    def stream(
        self, prompt: str = "", num_tokens: int = NUM_TOKENS, use_cache: bool = True, **sampling: Any
    ) -> Iterator[str]:
        """The continuation, piece by piece as it is generated."""
        settings, ids = self._start(prompt, num_tokens, sampling)
        params = self.backend.asarray(self.params)
        return self._pieces(generate(self.backend, self.model, params, ids, num_tokens, settings, use_cache))

    def generate_several(
        self, number: int, prompt: str = "", num_tokens: int = NUM_TOKENS, **sampling: Any
    ) -> list[str]:
        """So many continuations, each with the prompt, computed together: far faster than one after the other.

        Text i is what `generate` gives with the seed `seed` + i. Raises BabyError as `generate` does.
        """
        if number < 1:
            raise BabyError(f"number must be at least 1, not {number}")
        settings, ids = self._start(prompt, num_tokens, sampling)
        params, prompts = self.backend.asarray(self.params), [ids] * number
        steps = list(generate_several(self.backend, self.model, params, prompts, num_tokens, settings))
        return [prompt + "".join(self._pieces(iter(text))) for text in np.array(steps).T.tolist()]

    def _start(self, prompt: str, num_tokens: int, sampling: dict[str, Any]) -> tuple[Sampling, np.ndarray]:
        """What to draw by, and the ids to go on from."""
        if num_tokens < 1:
            raise BabyError(f"num_tokens must be at least 1, not {num_tokens}")
        settings = Sampling(**sampling)
        return settings, self.tokenizer.encode(prompt, "prompt") if prompt else self.first_ids()

    def evaluate(self, data: str | None = None, num_tokens: int = 2000, seed: int = 0) -> "Evaluation":
        """Measure the run over the whole validation part of its text, or of another one (`data`).

        num_tokens are generated, with `seed`, and compared with the training part of that text.
        Raises BabyError if the run's text is no longer there or is another one by now, or if a text has
        characters that the run does not know.
        """
        from baby_xp import evaluation  # it needs much that generating does not

        chosen = settings_of(self.config, str(self.files.config))
        known = self.config["data"]
        if data is None and self.config["result"]["state"] == "imported":
            raise BabyError(f"run {self.guid} was imported without its text; name one with --data")
        where = data or (known["file"] if known["file"] and not Path(known["data"]).is_file() else known["data"])
        chosen = replace(chosen, data=replace(chosen.data, data=where))
        return evaluation.evaluate(self, chosen, None if data else known["sha256"], num_tokens, seed)

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Decode ids as they come; bytes wait until their character is whole."""
        if self.tokenizer.kind != "byte":
            yield from (self.tokenizer.decode([token]) for token in tokens)
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if piece := decoder.decode(bytes([token])):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def first_ids(self) -> np.ndarray:
        """What generation starts from without a prompt: an end of line, as a text has it before a beginning."""
        try:
            return self.tokenizer.encode("\n", "prompt")
        except BabyError:
            return np.zeros(1, np.int32)
