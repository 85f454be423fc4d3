"""A run in memory: a trained model with its files and settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baby_xp import checks
from baby_xp.arrays.backend import translate_out_of_memory
from baby_xp.config import EquationData, RunConfig
from baby_xp.errors import BabyError
from baby_xp.inference.trained_model import MORE_MEMORY, TrainedModel
from baby_xp.runs import store
from baby_xp.runs.store import RunFiles

if TYPE_CHECKING:
    from baby_xp.evaluation.evaluate import Evaluation
    from baby_xp.evaluation.gradient_check import GradientCheck
    from baby_xp.inspection.inspect import Inspection
    from baby_xp.text.dataset import EquationDataset, TextDataset


@dataclass(frozen=True)
class Run(TrainedModel):
    """A trained model with its files and settings."""

    files: RunFiles
    config: dict[str, Any]
    """The run's config file."""
    settings: RunConfig
    """What the config file says of model, training and data."""

    @property
    def guid(self) -> str:
        """The run's GUID."""
        return self.files.guid

    def answer(self, question: str) -> str:
        """The most likely answer to a question such as "4+4=": "4+4=8". "4+4" and "4 + 4 =" are the same question.

        If the context does not hold a whole equation, only the first digit of the answer, because the others do
        not follow from what the model sees.

        Raises BabyError for a text that is not a question of the table, and for a run without equations.
        """
        if not isinstance(self.settings.data, EquationData):
            raise BabyError(f"run {self.guid} did not learn equations: use generate")
        return self.ask(question, self.settings.data.table)

    def evaluate(self, data: str | Path | None = None, num_tokens: int = 2000, seed: int = 0) -> "Evaluation":
        """Measure the run over the whole validation part of its text, or of another one (`data`).

        num_tokens are generated, with `seed`, and compared with the training part of that text.
        Raises BabyError if the run's text is missing or has changed, or if a text has characters that the run
        does not know.
        """
        from baby_xp.evaluation import evaluate  # imported here, because generating text does not need it

        num_tokens, seed = checks.whole("num_tokens", num_tokens), checks.whole("seed", seed, None, None)
        with translate_out_of_memory(self.backend, lambda shortage: MORE_MEMORY):
            return evaluate.evaluate(self, self._dataset(data), num_tokens, seed)

    def inspect(
        self,
        prompt: str = "",
        backward: bool = False,
        patch: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> "Inspection":
        """Run the model on a prompt and record every array, under its name in the source.

        backward: the gradients of the prompt's mean loss too. patch: a dict from names of arrays,
        gradients or parameters to functions, each of which gets a copy of the array (of the backend) and returns
        its replacement, of the same shape and type; the rest is computed with it, gradients too. There is no
        dropout. Without a prompt, the model sees the token that generation starts from; of a prompt longer than
        n_ctx, a GPT sees the last n_ctx tokens. Raises BabyError for a prompt that the
        tokenizer cannot encode, a name that no array has, or a patch that does not fit.
        """
        from baby_xp.inspection import inspect  # imported here, because generating text does not need it

        prompt, backward = checks.text("prompt", prompt), checks.flag("backward", backward)
        if patch is not None and not isinstance(patch, Mapping):
            raise BabyError(f"patch must map names of arrays to functions, not be {checks.shown_value(patch)}")
        for name, function in (patch or {}).items():
            checks.function(f"patch of {name}", function)
        return inspect.inspect(self, prompt, backward, patch)

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
    ) -> "list[GradientCheck]":
        """Compare the gradient of every parameter with finite differences, in float64 on text of the run's own.

        tokens, batch: size of the batch; seed: which batch, mask of dropout and directions. For each parameter
        array, the slope of the loss along this many random directions and single elements; see gradient_check.py.
        data: another text. Raises BabyError if the run's text is missing, as `evaluate` does.
        """
        from baby_xp.evaluation import gradient_check

        return gradient_check.check(self, self._dataset(data).batches, tokens, batch, seed, elements, directions)

    def _dataset(self, data: str | Path | None) -> "TextDataset | EquationDataset":
        """The run's own data, or another text (`data`) with the run's ids."""
        from baby_xp.text import dataset  # imported here, because generating text does not need it

        settings, text, sha256 = self.settings, self.config["data"], None
        if data is not None:
            found = replace(settings.data, data=checks.path("data", data))
        elif self.config["result"]["state"] == "imported":
            raise BabyError(f"run {self.guid} was imported without its text; name one with --data")
        else:
            found, sha256 = dataset.of_run(settings.data, text["file"], text["sha256"]), text["sha256"]
        folder = store.folder_for_ids(self.files)
        return dataset.prepare(found, settings.model, settings.train, folder, self.tokenizer, sha256)
