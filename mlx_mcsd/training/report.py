"""What a run tells: a line while it runs, a log in JSON lines, a picture of the loss."""

import io
import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from ..files import write_atomically

LOG, PICTURE = "log.jsonl", "loss.png"


class Report:
    """Tells of a run; on machines other than the first, nothing.

    Args:
        folder: of the run.
        step: that it goes on behind; 0 at the beginning.
        steps: of the whole run.
        characters: per token that is learned, on average.
        silent: tell nothing.
    """

    def __init__(self, folder: Path, step: int, steps: int, characters: float, silent: bool):
        self._folder, self._steps = folder, steps
        self._characters, self._silent = characters, silent
        self._log = [] if silent else self._take_up(step)
        self._pictures = not silent
        self._bar = tqdm(total=steps, initial=step, unit=" steps", disable=silent or None)
        self._began = self._last = (time.perf_counter(), step)

    def advance(self) -> None:
        """Count a step."""
        self._bar.update()

    def trained(self, step: int, loss: float, tokens: int, **more: float) -> None:
        """Tell of the steps since the last report.

        Args:
            step: the last of them.
            loss: nats per token, the mean of what they learned.
            tokens: that a step reads.
            more: for the log.
        """
        now = time.perf_counter()
        bits = self._bits(loss, self._characters)
        last, before = self._last  # perhaps where the run was taken up, amid a report
        speed = (step - before) * tokens / (now - last)
        self._last = now, step
        line = f"loss {loss:.3f}, {bits:.3f} bits/char, {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(line)
        if self._bar.disable and not self._silent:  # no terminal, so no bar
            begun, first = self._began
            left = tqdm.format_interval((now - begun) / (step - first) * (self._steps - step))
            print(f"Step {step}/{self._steps}: {line}, {left} left", flush=True)
        entry = {"step": step, "loss": loss, "bits_per_character": bits, **more}
        self._add(entry | {"tokens_per_second": round(speed, 1)})

    def evaluated(self, step: int, loss: float, characters: float) -> None:
        """Tell the held-out loss, nats per token, and characters per token, and draw the picture.

        Time spent on it does not count as training.
        """
        bits = self._bits(loss, characters)
        self.say(
            f"Step {step}: held out {loss:.3f}, {bits:.3f} bits/char, perplexity "
            f"{math.exp(min(loss, 700)):.2f}"
        )
        self._add({"step": step, "val_loss": loss, "val_bits_per_character": bits})
        self._draw()

    def pause(self) -> float:
        """The time, for `resume`."""
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        """Leave out the time since a `pause`."""
        away = time.perf_counter() - paused
        self._last = self._last[0] + away, self._last[1]

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._silent:
            self._bar.write(text)

    def close(self) -> None:
        """Draw the picture once more and end the line."""
        self._draw()
        self._bar.close()

    @staticmethod
    def _bits(loss: float, characters: float) -> float:
        return loss / math.log(2) / characters

    def _take_up(self, step: int) -> list[dict]:
        """The log up to a step: what came behind it is done again."""
        file, entries = self._folder / LOG, []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:  # the last one, cut short by a kill
                break
        entries = [entry for entry in entries if entry["step"] <= step]
        text = "".join(f"{json.dumps(entry)}\n" for entry in entries)
        write_atomically(file, text.encode())
        return entries

    def _add(self, entry: dict) -> None:
        if self._silent:
            return
        self._log.append(entry)
        with open(self._folder / LOG, "a") as file:
            file.write(f"{json.dumps(entry)}\n")

    def _draw(self) -> None:
        if not (self._pictures and self._log):
            return
        try:
            picture = draw(self._log)
        except ImportError:
            self.say(f"No {PICTURE}: pip install 'mlx-mcsd[plot]' draws the loss.")
            self._pictures = False
            return
        write_atomically(self._folder / PICTURE, picture)


def draw(log: list[dict]) -> bytes:
    """The picture of a log, as a PNG: bits per character by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, style, label in (
        ("bits_per_character", dict(lw=1, color="#74a9cf"), "training"),
        ("val_bits_per_character", dict(marker="o", ms=3.5, color="#d9480f"), "held out"),
    ):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=f"{label}, last {points[-1][1]:.3f}", **style
            )
    axes.set(xlabel="step", ylabel="bits per character")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()
