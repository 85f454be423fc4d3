"""A trained model in memory, which generates text."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
from baby_xp_data.equation_table import EquationTable

from baby_xp import checks
from baby_xp.arrays.backend import Backend, translate_out_of_memory
from baby_xp.inference.generate import Logits, Sampling, generate, generate_several
from baby_xp.models import Model
from baby_xp.resources import limits
from baby_xp.text.tokenizer import Tokenizer, decoded, first_ids

NUM_TOKENS = 500
"""Tokens to generate unless asked otherwise."""


class SamplingSettings(TypedDict, total=False):
    """The fields of Sampling, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    seed: int


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer and its parameters, on a backend."""

    model: Model
    tokenizer: Tokenizer
    params: np.ndarray
    """The parameters (P,), on the host."""
    backend: Backend

    def generate(
        self,
        prompt: str = "",
        num_tokens: int = NUM_TOKENS,
        use_cache: bool = True,
        **sampling: Unpack[SamplingSettings],
    ) -> str:
        """The prompt and its continuation. `sampling`: temperature, top_k, top_p, greedy, seed.

        Raises BabyError for a prompt that the tokenizer cannot encode, or a setting that makes no sense.
        """
        return prompt + "".join(self.stream(prompt, num_tokens, use_cache, **sampling))

    def stream(
        self,
        prompt: str = "",
        num_tokens: int = NUM_TOKENS,
        use_cache: bool = True,
        **sampling: Unpack[SamplingSettings],
    ) -> Iterator[str]:
        """The continuation, piece by piece as it is generated. Arguments and errors as in `generate`."""
        settings, ids, num_tokens = self._start(prompt, num_tokens, sampling)
        use_cache = checks.flag("use_cache", use_cache)
        with self._memory_errors():
            params = self.backend.asarray(self.params)
        tokens = generate(self.backend, self.model, params, ids, num_tokens, settings, use_cache)
        return self._pieces(tokens)

    def generate_several(
        self, number: int, prompt: str = "", num_tokens: int = NUM_TOKENS, **sampling: Unpack[SamplingSettings]
    ) -> list[str]:
        """This many continuations, each with the prompt, computed together, which is much faster than one by one.

        Text i is what `generate` gives with the seed `seed` + i. Raises BabyError as `generate` does, and for more
        texts than memory holds.
        """
        number = checks.whole("number", number, most=None)
        settings, ids, num_tokens = self._start(prompt, num_tokens, sampling)
        limits.check_texts(self.model, self.backend, number)
        with self._memory_errors("ask for fewer texts, or "):
            params, prompts = self.backend.asarray(self.params), [ids] * number
            steps = list(generate_several(self.backend, self.model, params, prompts, num_tokens, settings))
        return [prompt + "".join(decoded(self.tokenizer, iter(text))) for text in np.array(steps).T.tolist()]

    def logits(self, prompt: str = "") -> np.ndarray:
        """The logits (V,) of the token that follows the prompt, in float64 on the host.

        Raises BabyError for a prompt that the tokenizer cannot encode.
        """
        ids = self._ids(checks.text("prompt", prompt))
        with self._memory_errors():
            p = self.model.layout.unpack(self.backend.xp, self.backend.asarray(self.params))
            return Logits(self.backend, self.model, p).next([ids.tolist()])[0]

    def ask(self, question: str, table: EquationTable) -> str:
        """The most likely answer to a question of the table that the model learned: "4+4=" -> "4+4=8".

        "4+4" and "4 + 4 =" are the same question. If the context does not hold a whole equation, only the first
        digit of the answer, because the others do not follow from what the model sees. Raises BabyError for a
        text that is not a question of the table.
        """
        text = table.question(question)
        whole = self.model.config.n_ctx >= table.longest
        for piece in self.stream(text, table.digits + 2 if whole else 1, greedy=True):
            if piece == " ":
                break
            text += piece
        return text

    def _start(
        self, prompt: str, num_tokens: int, sampling: Mapping[str, Any]
    ) -> tuple[Sampling, np.ndarray, int]:
        """The sampling settings, the ids of the prompt, and the number of tokens."""
        prompt, num_tokens = checks.text("prompt", prompt), checks.whole("num_tokens", num_tokens, most=None)
        return Sampling.of(sampling), self._ids(prompt), num_tokens

    def _ids(self, prompt: str) -> np.ndarray:
        return self.tokenizer.encode(prompt, "prompt") if prompt else first_ids(self.tokenizer)

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        with self._memory_errors():
            yield from decoded(self.tokenizer, tokens)

    def _memory_errors(self, advice: str = "") -> AbstractContextManager[None]:
        """Turns errors about the device's memory into OutOfMemory, with advice."""
        return translate_out_of_memory(self.backend, lambda shortage: advice + MORE_MEMORY)


MORE_MEMORY = (
    "stop other programs that use the GPU's memory (nvidia-smi shows it), raise --memory-gib, "
    "or use --backend numpy"
)
"""What to do if a trained model does not fit."""
