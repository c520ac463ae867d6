"""EleutherAI's evaluation harness on an MCSD model, through mlx-lm's adapter.

``lm_eval`` makes the requests of a task and its metrics, ``mlx_lm.evaluate.MLXLM`` answers them:
a context is read once, and each continuation is scored, or a text generated, from a copy of its
state. Its batches are padded on the right, which changes no figure of a model that only looks back.
"""

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path

import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM

from .errors import MCSDError
from .loading import one_line


class Adapter(MLXLM):
    """mlx-lm's adapter around a model that is loaded already, nothing of its checkpoint executed.

    Contexts are never cut, since memory does not grow with them: mlx-lm cuts them to 8,192 tokens.
    A tokenizer that begins texts with no token gets the one that ends them, as in Hugging Face's
    adapter: from nothing mlx-lm gives each continuation the same score, and the first one is right.

    Args:
        model: an MCSD model.
        tokenizer: mlx-lm's wrapper, from :func:`mlx_mcsd.load`.
        max_tokens: to generate at most; None is what the task says.
        batch_size: texts to generate, or to score whole, at a time.
        use_chat_template: put contexts in the tokenizer's chat template.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        max_tokens: int | None = None,
        batch_size: int = 8,
        use_chat_template: bool = False,
    ):
        LM.__init__(self)
        self._model, self.tokenizer = model, tokenizer
        self._max_tokens, self._batch_size = max_tokens, batch_size
        self.use_chat_template, self._sampler = use_chat_template, None

    def _tokenize(self, texts):
        begin = () if self.use_chat_template else self._begin()
        return [begin + tuple(ids) for ids in super()._tokenize(texts)]

    def _begin(self) -> tuple[int, ...]:
        if self.tokenizer.encode(""):
            return ()
        if self.tokenizer.eos_token_id is None:
            raise MCSDError("tasks need a tokenizer with a token that begins or ends a text.")
        return (self.tokenizer.eos_token_id,)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Log-likelihood of each (context, continuation), and whether greedy decoding gives it."""
        limit, self._max_tokens = self._max_tokens, sys.maxsize
        try:
            return super().loglikelihood(requests)
        finally:
            self._max_tokens = limit


def run_tasks(
    adapter: Adapter,
    tasks: list[str],
    *,
    num_shots: int | None = None,
    limit: int | None = None,
    seed: int = 123,
) -> dict:
    """Evaluate tasks and return what ``lm_eval.simple_evaluate`` does.

    Args:
        adapter: the model.
        tasks: names known to lm_eval, or paths of task files (YAML).
        num_shots: examples in front of each question; None is what the task says.
        limit: questions of each task at most.
        seed: of the choice of examples.

    Raises:
        MCSDError: if there is no such task, or a file is none.
    """
    # Its remarks; lm_eval's own tasks are thousands of files, which those of the caller need not.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [name for name in tasks if name.endswith((".yaml", ".yml"))]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise MCSDError(f"no task {missing[0]}: there is no such file.")
    manager = TaskManager(include_defaults=files != tasks)
    if unknown := [name for name in tasks if name not in (*files, *manager.all_tasks)]:
        raise MCSDError(f"no task {unknown[0]}: name one that lm_eval knows, or a YAML file.")
    try:
        manager.load(files)
    except (ValueError, yaml.YAMLError) as error:
        raise MCSDError(f"a file of --tasks is no task: {one_line(error)}") from error
    # mlx-lm prints how fast it generates.
    with redirect_stdout(sys.stderr):
        return simple_evaluate(
            model=adapter,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_shots,
            limit=limit,
            apply_chat_template=adapter.use_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
