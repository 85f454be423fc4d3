"""A run in memory: a trained model that generates."""

import codecs
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from baby_xp_data.equation_table import EquationTable

from baby_xp import checks
from baby_xp.arrays.backend import Backend, Shortage, translate_out_of_memory
from baby_xp.config import EquationData, data_from_dict, settings_of
from baby_xp.errors import BabyError
from baby_xp.inference.generate import Sampling, generate, generate_several
from baby_xp.models import Model
from baby_xp.resources import limits
from baby_xp.runs import store
from baby_xp.runs.store import RunFiles
from baby_xp.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from baby_xp.config import Preset
    from baby_xp.evaluation.evaluate import Evaluation
    from baby_xp.evaluation.gradient_check import Row
    from baby_xp.inspection.inspect import Inspection
    from baby_xp.text import dataset

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
        pieces = self.stream(prompt, num_tokens, use_cache, **sampling)
        return prompt + "".join(pieces)

    def stream(
        self, prompt: str = "", num_tokens: int = NUM_TOKENS, use_cache: bool = True, **sampling: Any
    ) -> Iterator[str]:
        """The continuation, piece by piece as it is generated."""
        settings, ids, num_tokens = self._start(prompt, num_tokens, sampling)
        use_cache = checks.flag("use_cache", use_cache)
        with translate_out_of_memory(self.backend, _more_memory):
            params = self.backend.asarray(self.params)
        tokens = generate(self.backend, self.model, params, ids, num_tokens, settings, use_cache)
        return self._pieces(self._told(tokens))

    def generate_several(
        self, number: int, prompt: str = "", num_tokens: int = NUM_TOKENS, **sampling: Any
    ) -> list[str]:
        """So many continuations, each with the prompt, computed together: far faster than one after the other.

        Text i is what `generate` gives with the seed `seed` + i. Raises BabyError as `generate` does.
        """
        number = checks.whole("number", number, most=None)
        settings, ids, num_tokens = self._start(prompt, num_tokens, sampling)
        limits.check_texts(self.model, self.backend, number)
        advice = lambda shortage: f"ask for fewer texts, or {_more_memory(shortage)}"  # noqa: E731
        with translate_out_of_memory(self.backend, advice):
            params, prompts = self.backend.asarray(self.params), [ids] * number
            steps = list(generate_several(self.backend, self.model, params, prompts, num_tokens, settings))
        return [prompt + "".join(self._pieces(iter(text))) for text in np.array(steps).T.tolist()]

    def answer(self, question: str, table: EquationTable | None = None) -> str:
        """The most likely answer to a question such as "4+4=": "4+4=8". "4+4" and "4 + 4 =" ask the same.

        Its first digit alone where the context does not hold an equation whole: the other digits then do not
        follow from what the model sees. table: None for that of the run.

        Raises BabyError for what is no question of the run's table, and for a run that learned no equations.
        """
        if table is None:
            data = data_from_dict(self.config["data"], str(self.files.config))
            if not isinstance(data, EquationData):
                raise BabyError(f"run {self.guid} did not learn equations: let it generate")
            table = data.table
        text = table.question(question)
        whole = self.model.config.n_ctx >= table.longest
        for piece in self.stream(text, table.digits + 2 if whole else 1, greedy=True):
            if piece == " ":
                break
            text += piece
        return text

    def _start(self, prompt: str, num_tokens: int, sampling: dict[str, Any]) -> tuple[Sampling, np.ndarray, int]:
        """What to draw by, the ids to go on from, and the number of tokens."""
        prompt, num_tokens = checks.text("prompt", prompt), checks.whole("num_tokens", num_tokens, most=None)
        settings = Sampling.of(sampling)
        ids = self.tokenizer.encode(prompt, "prompt") if prompt else self.first_ids()
        return settings, ids, num_tokens

    def evaluate(self, data: str | Path | None = None, num_tokens: int = 2000, seed: int = 0) -> "Evaluation":
        """Measure the run over the whole validation part of its text, or of another one (`data`).

        num_tokens are generated, with `seed`, and compared with the training part of that text.
        Raises BabyError if the run's text is no longer there or is another one by now, or if a text has
        characters that the run does not know.
        """
        from baby_xp.evaluation import evaluate  # it needs much that generating does not

        num_tokens, seed = checks.whole("num_tokens", num_tokens), checks.whole("seed", seed, None, None)
        data = None if data is None else checks.path("data", data)
        with translate_out_of_memory(self.backend, _more_memory):
            return evaluate.evaluate(self, self._dataset(data), num_tokens, seed)

    def _dataset(self, data: str | None) -> "dataset.TextDataset | dataset.EquationDataset":
        """What the run learned from, or another text (`data`) with the run's ids."""
        from baby_xp.text import dataset

        chosen, sha256 = self._settings(data)
        folder = store.folder_for_ids(self.files)
        return dataset.prepare(chosen.data, chosen.model, chosen.train, folder, self.tokenizer, sha256)

    def _settings(self, data: str | None) -> tuple["Preset", str | None]:
        """The run's settings with the place of its text, or of another one, and the SHA-256 that it must have."""
        chosen = settings_of(self.config, str(self.files.config))
        known = self.config["data"]
        if data is None and self.config["result"]["state"] == "imported":
            raise BabyError(f"run {self.guid} was imported without its text; name one with --data")
        if data is not None:
            return replace(chosen, data=replace(chosen.data, data=data)), None
        from baby_xp.text import dataset  # it needs much that generating does not

        return replace(chosen, data=dataset.of_run(chosen.data, known["file"], known["sha256"])), known["sha256"]

    def inspect(
        self,
        prompt: str = "",
        backward: bool = False,
        change: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> "Inspection":
        """Let the model read a prompt and see every array on the way, under its name in the source.

        backward: the gradients of the prompt's mean loss too. change: for names of arrays, gradients or
        parameters a function each, which gets a copy of the array (of the backend) and returns what shall go on
        in its place, of the same shape and type. A gradient is computed as if what was put in place had always
        been there. There is no dropout. Without a prompt, the model sees what generation begins with; of a
        prompt longer than n_ctx, a GPT sees the last n_ctx tokens. Raises BabyError for a prompt that the
        tokenizer cannot encode, a name that no array has, or a change that does not fit.
        """
        from baby_xp.inspection import inspect  # it needs much that generating does not

        prompt, backward = checks.text("prompt", prompt), checks.flag("backward", backward)
        if change is not None and not isinstance(change, Mapping):
            raise BabyError(f"change must map names of arrays to functions, not be {checks.shown_value(change)}")
        for name, function in (change or {}).items():
            checks.function(f"change of {name}", function)
        return inspect.inspect(self, prompt, backward, change)

    def neighbours(self, token: str, k: int = 5) -> list[tuple[str, float]]:
        """The k tokens whose rows of the token embedding are nearest to that of `token`, by the cosine.

        Cosines go from 1, the same direction, to -1, the opposite one. Raises BabyError unless `token` is one
        token that the run knows.
        """
        from baby_xp.inspection import inspect

        token, k = checks.text("token", token), checks.whole("k", k, least=0)
        return inspect.neighbours(self, token, k)

    def check(
        self,
        tokens: int = 16,
        batch: int = 2,
        seed: int = 0,
        elements: int = 4,
        directions: int = 3,
        data: str | Path | None = None,
    ) -> "list[Row]":
        """Hold the gradient of every parameter against finite differences, in float64 on text of the run's own.

        tokens, batch: size of the batch; seed: which batch, mask of dropout and directions. For each parameter
        array, the slope of the loss along so many random directions and single elements; see checking.py.
        data: another text. Raises BabyError if the run's text is no longer there, as `evaluate` does.
        """
        from baby_xp.evaluation import gradient_check

        data = None if data is None else checks.path("data", data)
        return gradient_check.check(self, *self._settings(data), tokens, batch, seed, elements, directions)

    def _told(self, tokens: Iterator[int]) -> Iterator[int]:
        with translate_out_of_memory(self.backend, _more_memory):
            yield from tokens

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


def _more_memory(shortage: Shortage) -> str:
    """What to do where a trained model does not fit."""
    return "end what else holds the GPU's memory (nvidia-smi shows it), raise --memory-gib, or use --backend numpy"
