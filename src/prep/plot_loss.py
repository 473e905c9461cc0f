#!/usr/bin/env python3
"""Draws the loss of a run: training loss per step, its running mean, and the loss on held-out data.

plot_loss.py runs/demo/metrics.jsonl -o loss.png
"""

import json
import sys

from qprep.packages import need

need("matplotlib")

import matplotlib  # noqa: E402

matplotlib.use("Agg")  # no display on a login node
import matplotlib.pyplot as plt  # noqa: E402

from qprep import errors
from qprep.errors import OneLineParser, PrepError, run
from qprep.files import finished

MEAN_OF = 10  # steps of the running mean


def read_metrics(path):
    """([(step, loss)], [(step, eval_loss)]) in the order of steps; a step that a resumed run did again counts once."""
    train, held_out = {}, {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except IsADirectoryError as error:
        raise PrepError(errors.INPUT_FORMAT, path, "is a folder; name the metrics.jsonl of a run") from error
    except OSError as error:
        raise PrepError(errors.INPUT_MISSING, path, f"cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PrepError(errors.INPUT_FORMAT, path, "is no text; name the metrics.jsonl of a run") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
            if "loss" in record:
                train[step] = float(record["loss"])
            if "eval_loss" in record:
                held_out[step] = float(record["eval_loss"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue  # a killed run may leave half a last line
            raise PrepError(
                errors.INPUT_FORMAT, f"{path}:{number}", f"is no line of metrics: {error!r}"
            ) from error
    if not train and not held_out:
        raise PrepError(errors.INPUT_VALUE, path, "holds no loss; has the run made a step?")
    return sorted(train.items()), sorted(held_out.items())


def running_mean(points):
    """Mean of the last MEAN_OF losses at each step."""
    losses = [loss for _, loss in points]
    return [
        sum(losses[max(0, i + 1 - MEAN_OF) : i + 1]) / min(i + 1, MEAN_OF)
        for i in range(len(losses))
    ]


def draw(train, held_out, path):
    figure, axes = plt.subplots(figsize=(7.0, 4.2), dpi=120)
    if train:
        steps = [step for step, _ in train]
        axes.plot(
            steps,
            [loss for _, loss in train],
            color="0.75",
            linewidth=1.0,
            label="training, each step",
        )
        axes.plot(
            steps,
            running_mean(train),
            color="tab:blue",
            linewidth=1.8,
            label=f"training, mean of {MEAN_OF}",
        )
    if held_out:
        axes.plot(*zip(*held_out), color="tab:orange", marker="o", linewidth=1.8, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per learned token (nats)")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    figure.tight_layout()
    with finished(path) as temporary:
        figure.savefig(temporary, format="png")


def main(argv):
    parser = OneLineParser(prog="plot_loss.py", description="the loss curves of a run as a PNG")
    parser.add_argument("metrics", metavar="METRICS.jsonl")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.png", help="replaced if it is there"
    )
    options = parser.parse_args(argv)
    train, held_out = read_metrics(options.metrics)
    draw(train, held_out, options.output)
    print(f"{options.output}: {len(train)} steps, {len(held_out)} evaluations")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
