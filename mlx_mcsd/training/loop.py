"""A run from its folder to its last step."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import loading
from ..cli import Interrupts
from ..config import ModelArgs
from ..errors import MCSDError
from ..model import Model
from . import checkpoint
from .config import TrainConfig
from .corpus import COMPLETE, Corpus
from .evaluation import HeldOut, characters_per_token, sample
from .export import write_weights
from .machines import broadcast, from_first, gather, part_of
from .prepare import DATA, make_model, prepare
from .report import Report
from .step import Stepper, learning_rate
from .streams import Streams

CHECKPOINTS = "checkpoints"
BEGINNING = {"step": 0, "nats": 0.0, "learned": 0}
"""What a checkpoint says besides arrays: the step, and the sums for the next report."""


class Run:
    """A run in its folder, at its beginning or at its newest checkpoint.

    Args:
        config: the settings.
        folder: of the run; it exists on the first machine.
        group: the machines.

    Raises:
        MCSDError: if the data, the tokenizer, the shape or a checkpoint are unfit.
    """

    def __init__(self, config: TrainConfig, folder: Path, group: mx.distributed.Group):
        if config.batch_size % group.size():
            raise MCSDError(
                f"[train] batch_size must be a multiple of the {group.size()} processes but is "
                f"{config.batch_size}."
            )
        self.config, self.folder, self.group = config, folder, group
        self.corpus = self._read_data()
        tokenizer = loading.load_tokenizer(folder)
        rows, N = config.batch_size, config.max_seq_length
        self.streams = Streams(
            self.corpus.train,
            rows * config.grad_accumulation_steps,
            N,
            config.seed,
            config.pack,
            config.forget,
        )
        self._take_up()
        self.held_out = None
        if self.corpus.valid.tokens.size > 1:
            held_out = HeldOut(self.corpus.valid, tokenizer, rows, N, config.val_batches)
            self.held_out = held_out if held_out.tokens else None  # prompts alone, or no batches
        characters = characters_per_token(tokenizer, sample(self.corpus.train))
        first = group.rank() == 0
        self.report = Report(folder, self.facts["step"], config.iters, characters, not first)

    def train(self) -> None:
        """Go on to the last step.

        Raises:
            MCSDError: if the loss or a gradient is no number.
            KeyboardInterrupt: with a checkpoint written, where it was asked for.
        """
        self._introduce()
        config, asked = self.config, False
        with Interrupts() as interrupts:
            while self.facts["step"] < config.iters and not asked:
                asked = self._step(lambda: interrupts.asked)
                step = self.facts["step"]
                last = step == config.iters
                if step % config.steps_per_report == 0 or last:
                    self._report()
                paused = self.report.pause()
                if self.held_out and (step % config.steps_per_eval == 0 or last):
                    loss = self.held_out.loss(self.stepper)
                    self.report.evaluated(step, loss, self.held_out.characters)
                if step % config.save_every == 0 or last or asked:
                    self._save()
                self.report.resume(paused)
        self.report.close()
        if asked:
            print(
                f"Interrupted behind step {self.facts['step']}: python -m mlx_mcsd.train --resume "
                f"{self.folder} goes on.",
                file=sys.stderr,
            )
            raise KeyboardInterrupt
        self.report.say(f"Done: python -m mlx_mcsd.generate --model {self.folder}")

    def _read_data(self) -> Corpus:
        from_first(self.group, lambda: prepare(self.config, self.folder))
        if not (self.folder / DATA / COMPLETE).exists():  # a machine with a disk of its own
            self.folder.mkdir(parents=True, exist_ok=True)
            prepare(self.config, self.folder)
        corpus = Corpus(self.folder / DATA)
        digest = from_first(self.group, lambda: corpus.digest)
        differing = mx.distributed.all_sum(mx.array(corpus.digest != digest), group=self.group)
        if differing.item():
            raise MCSDError(
                "[train] the data must be the same on every machine but differ from the first "
                "machine's; copy them from there."
            )
        return corpus

    def _take_up(self) -> None:
        """Make the model, and the optimiser and states of a checkpoint, if there is one."""
        saved = checkpoint.all_of(self.folder / CHECKPOINTS)
        tree = None

        def read():
            nonlocal tree
            if not saved:
                return dict(BEGINNING)
            tree, facts = checkpoint.load(saved[-1])
            return facts

        self.facts = from_first(self.group, read)
        if self.facts.setdefault("data", self.corpus.digest) != self.corpus.digest:
            raise MCSDError(
                f"[train] {self.folder / DATA} must hold the tokens of the first "
                f"{self.facts['step']} steps but holds others: bring the texts back and delete it, "
                "or begin another run with --init-from."
            )
        if not self.facts["step"]:
            model = make_model(self.config, self.folder)
            self.stepper = Stepper(model, self.config, self.group)
            return
        model = Model(ModelArgs.from_dict(loading.read_config(self.folder)))
        self.stepper = stepper = Stepper(model, self.config, self.group)
        batches = range(self.config.grad_accumulation_steps)
        states = [stepper.fresh(self.config.batch_size) for _ in batches]
        like = {"model": model.parameters(), "optimizer": stepper.optimizer.state, "states": states}
        if tree is not None and _shapes(tree) != _shapes(like):
            raise MCSDError(f"[train] {saved[-1]} must be a checkpoint of this model but is none.")
        tree = broadcast(tree or like, self.group)
        model.update(tree["model"])
        stepper.optimizer.state = tree["optimizer"]
        stepper.states = part_of(tree["states"], self.group)

    def _introduce(self) -> None:
        size = sum(w.size for _, w in tree_flatten(self.stepper.model.parameters()))
        train, valid = self.corpus.train, self.corpus.valid
        text = (
            f"{size:,} parameters; {train.tokens.size:,} tokens in {len(train):,} documents to "
            f"learn, {valid.tokens.size:,} tokens held out"
        )
        step = self.facts["step"]
        self.report.say(f"{text}; going on behind step {step}" if step else text)

    def _step(self, asked: Callable[[], bool]) -> bool:
        """Take a step; whether some machine asks to stop."""
        number, facts = self.facts["step"], self.facts
        segment = self.streams.segment(number)
        result = self.stepper(number, segment, asked)
        if not (math.isfinite(result.nats) and math.isfinite(result.norm)):
            self._diverged(number, result)
        facts["step"] += 1
        facts["nats"] += result.nats
        facts["learned"] += int(segment.scored.sum())
        self._norm = result.norm
        self.report.advance()
        return result.asked

    def _diverged(self, number, result) -> None:
        saved = checkpoint.all_of(self.folder / CHECKPOINTS)
        where = f"{saved[-1]} is the last checkpoint" if saved else "there is no checkpoint yet"
        raise MCSDError(
            f"[train] the loss and its gradient must be numbers but are {result.nats} and "
            f"{result.norm} at step {number + 1}, which read "
            f"{self.corpus.describe(self.streams.named(number))}; {where}: lower learning_rate."
        )

    def _report(self) -> None:
        facts, config = self.facts, self.config
        tokens = self.streams.rows * self.streams.length  # a step
        self.report.trained(
            facts["step"],
            facts["nats"] / max(facts["learned"], 1),
            tokens,
            learning_rate=learning_rate(config, facts["step"] - 1),
            gradient_norm=self._norm,
            epoch=facts["step"] * tokens / self.corpus.train.tokens.size,
        )
        facts |= {"nats": 0.0, "learned": 0}

    def _save(self) -> None:
        stepper = self.stepper
        states = gather(stepper.states, self.group)
        if self.group.rank():
            return
        model = stepper.model.parameters()
        tree = {"model": model, "optimizer": stepper.optimizer.state, "states": states}
        step = self.facts["step"]
        checkpoint.check(tree, step)
        # Killed between the two, a run goes on from the checkpoint before, and writes both again.
        write_weights(self.folder, stepper.model, self.config.dtype)
        checkpoint.save(self.folder / CHECKPOINTS, step, tree, self.facts, self.config.keep)


def _shapes(tree) -> dict:
    return {name: (a.shape, a.dtype) for name, a in tree_flatten(tree)}
