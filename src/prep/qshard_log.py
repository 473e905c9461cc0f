#!/usr/bin/env python3
"""Sends the numbers of a run to Weights & Biases or TensorBoard, while it goes on or after it.

    qshard_log.py runs/demo --to wandb --follow

Every number of metrics.jsonl goes under its own name and step; null, which stands for what is not finite, is left out. What
has been sent stands in RUN/LOGGER.sent.json, so that the same command goes on where it ended. A run that resumes cuts the
file back to its checkpoint and writes the same steps again: they are not sent twice, as what counts is the step, not the
place in the file. Neither logger is a package that qshard needs; each is imported when it is asked for.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import sys
import time

from qprep import errors
from qprep.errors import OneLineParser, PrepError, one_line, run
from qprep.files import read_json, write_json

NOTHING = (-1, 0)  # (step, lines of this step), of which none was sent


class Wandb:
    """A run of W&B by the id of ours. It takes a step once, when the next one comes or it ends, so `once`: a step is sent as
    a whole. W&B's own variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_MODE ...) count."""

    once = True

    def __init__(self, folder, name, run_id, config, _anew):
        wandb = needed("wandb", ("wandb",))
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "qshard"),
                name=os.environ.get("WANDB_NAME", name),
                id=run_id,
                resume="allow",
                config=settings_of(config),
                dir=os.environ.get("WANDB_DIR", folder),
            )
        except Exception as error:  # not logged in, no network, a project of somebody else's
            raise PrepError(errors.ENVIRONMENT, "wandb", f"cannot start: {str(error).rstrip('.')}; wandb login, or WANDB_MODE=offline") from error
        self.place = f"W&B, run {run_id}"

    def send(self, step, values):
        self.run.log(values, step=step, commit=True)

    def flush(self):
        pass

    def close(self):
        self.run.finish()


class TensorBoard:
    """Event files in FOLDER/tensorboard, a further one for each start. torch.utils.tensorboard comes first, as whoever has torch
    and tensorboard has it already; tensorboardX is the same without torch's gigabytes."""

    once = False

    def __init__(self, folder, _name, _run_id, config, anew):
        module = needed("tensorboardX", ("torch.utils.tensorboard", "tensorboardX"))
        self.place = os.path.join(folder, "tensorboard")
        self.writer = module.SummaryWriter(self.place)
        if anew:
            self.writer.add_text("config", "".join(f"    {line}\n" for line in config.splitlines()), 0)

    def send(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


LOGGERS = {"wandb": Wandb, "tensorboard": TensorBoard}


def needed(package, modules):
    """The first of the modules that can be imported; `package` is what pip installs where none is there."""
    reasons = []
    for name in modules:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # the latter where a library that the module loads is missing
            reasons.append(f"{name} ({error})")
    raise PrepError(errors.ENVIRONMENT, sys.executable, f"cannot import {' or '.join(reasons)}; pip install {package}")


def settings_of(text):
    """{"optim.lr": 5e-4, ...} of a resolved configuration: two levels, a value or a list on each line, comments behind."""
    settings, section = {}, ""
    for line in text.splitlines():
        found = re.match(r"( *)([a-z0-9_]+): *(.*)", line)
        if not found:
            continue
        inner, key, value = found.groups()
        section = section if inner else ""
        if not value:
            section = f"{key}."
            continue
        settings[section + key] = value_of(value)
    return settings


def value_of(text):
    try:
        return json.JSONDecoder().raw_decode(text)[0] if text[0] == '"' else json.loads(text.partition("  #")[0])
    except ValueError:
        return text.partition("  #")[0].rstrip()


class Metrics:
    """The whole lines of metrics.jsonl, as they come."""

    def __init__(self, path):
        self.path = path
        self.begin_anew()

    def begin_anew(self):
        self.at = self.number = 0
        self.last = b""  # the line before `at`

    def read(self):
        """(whether the file was read from its beginning, [(step, numbers)] of the lines that are new in it)."""
        try:
            with open(self.path, "rb") as file:
                data = self.rest(file)
                if data is None:  # not the file that it was: a resumed run has cut it
                    self.begin_anew()
                    data = self.rest(file)
        except FileNotFoundError:
            return False, []
        except OSError as error:
            raise PrepError(errors.INPUT_MISSING, self.path, f"cannot read: {error.strerror}") from error
        anew, lines = self.at == 0, data[: data.rfind(b"\n") + 1].splitlines(keepends=True)  # half a line waits for its end
        found = [self.parsed(line) for line in lines]
        self.at += sum(map(len, lines))
        self.last = lines[-1] if lines else self.last
        return anew, found

    def rest(self, file):
        """The bytes behind the last line, None where it does not stand there any more."""
        file.seek(self.at - len(self.last))
        data = file.read()
        return data[len(self.last) :] if data.startswith(self.last) else None

    def parsed(self, line):
        self.number += 1
        try:
            record = json.loads(line)
            step = record.pop("step")
            if type(step) is not int:
                raise TypeError("the step is not a whole number")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PrepError(errors.INPUT_FORMAT, f"{self.path}:{self.number}", f"is no line of metrics: {error!r}") from error
        return step, {name: value for name, value in record.items() if type(value) in (int, float)}


class Sending:
    """What has been sent, and what a logger that takes a step once has to wait for."""

    def __init__(self, logger, state_path, run_id, sent):
        self.logger, self.state_path, self.run_id = logger, state_path, run_id
        self.sent = self.saved = sent
        self.count = 0
        self.place = NOTHING  # of the last line that was read
        self.held = []  # [(place, numbers)] of one step

    def take(self, anew, lines, whole):
        """Sends what is new of the lines; `whole`: nothing more will come."""
        if anew:
            self.place, self.held = NOTHING, []
        for step, values in lines:
            self.place = (step, self.place[1] + 1 if step == self.place[0] else 1)
            if self.place <= self.sent:
                continue
            if self.held and self.held[-1][0][0] != step:
                self.send_held()
            self.held.append((self.place, values))
            if not self.logger.once:
                self.send_held()
        if whole and self.held:
            self.send_held()
        self.save()

    def send_held(self):
        values = {name: value for _, values in self.held for name, value in values.items()}
        self.call(self.logger.send, self.held[0][0][0], values)
        self.sent = self.held[-1][0]
        self.count += len(self.held)
        self.held = []

    def call(self, function, *arguments):
        """A call of the logger, whatever it raises as one line."""
        try:
            function(*arguments)
        except OSError as error:
            raise errors.write_failed(self.logger.place, error) from error
        except Exception as error:
            raise PrepError(errors.IO_FAILED, self.logger.place, f"cannot send: {error}; the same command goes on from there") from error

    def save(self):
        """What has left this process counts as sent: TensorBoard's file has it then, or W&B's own process."""
        if self.saved != self.sent:
            self.call(self.logger.flush)
            write_state(self.state_path, self.run_id, self.sent)
            self.saved = self.sent


def write_state(path, run_id, sent):
    write_json(path, {"run_id": run_id, "step": sent[0], "lines": sent[1]})


def sent_before(path, run_id):
    """What an earlier start has sent of this run."""
    if not os.path.exists(path):
        return NOTHING
    state = read_json(path)
    place = state.get("step"), state.get("lines")
    if state.get("run_id") != run_id or not all(type(number) is int for number in place):
        return NOTHING
    return place


def read_run(folder):
    path = os.path.join(folder, "run.json")
    if not os.path.lexists(path):
        raise PrepError(errors.INPUT_MISSING, folder, "holds no run.json; name the folder of a run, its output")
    state = read_json(path)
    if state.get("format") != "qshard-run" or not isinstance(state.get("run_id"), str):
        raise PrepError(errors.INPUT_FORMAT, path, "is not of a run of qshard")
    return state


def read_text(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # a run without settings is shown all the same


def begin(options):
    """(the logger, what it has been sent) of the run."""
    run_id = read_run(options.run)["run_id"]
    folder = options.dir or options.run
    state_path = os.path.join(folder, f"{options.to}.sent.json")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise errors.write_failed(folder, error) from error
    sent = sent_before(state_path, run_id)
    if options.to == "tensorboard" and not os.path.isdir(os.path.join(folder, "tensorboard")):
        sent = NOTHING  # somebody removed what was shown
    name = os.path.basename(os.path.abspath(options.run))
    write_state(state_path, run_id, sent)  # where that fails, nothing has been sent yet
    config = read_text(os.path.join(options.run, "config.yaml"))
    logger = LOGGERS[options.to](folder, name, run_id, config, sent == NOTHING)
    return Sending(logger, state_path, run_id, sent)


def wait_for_run(options):
    path = os.path.join(options.run, "run.json")
    if options.follow and not os.path.exists(path):
        print(f"waiting for {path}", file=sys.stderr)
        while not os.path.exists(path):
            time.sleep(options.every)


@contextlib.contextmanager
def signals_noted():
    """The signals that came and would have ended the program: none may come between a line and the note that it was sent."""
    came = []

    def note(number, _frame):
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait for a logger that hangs
        came.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *errors.ENDING)}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send_all(options, sending, came):
    metrics = Metrics(os.path.join(options.run, "metrics.jsonl"))
    if not options.follow and not os.path.exists(metrics.path):
        raise PrepError(errors.INPUT_MISSING, metrics.path, "no such file; has the run made a step?")
    while True:
        finished = read_run(options.run).get("finished") is True  # first: what is read then is all
        sending.take(*metrics.read(), finished)
        if finished or not options.follow:
            return
        again = time.monotonic() + options.every
        while not came and time.monotonic() < again:
            time.sleep(min(options.every, 0.2))
        if came:
            return


def main(argv):
    parser = OneLineParser(prog="qshard_log.py", description="sends the metrics of a run to W&B or TensorBoard", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.add_argument("--to", required=True, choices=sorted(LOGGERS), help="W&B (its WANDB_* variables count) or TensorBoard")
    parser.add_argument("--follow", action="store_true", help="go on until the run has finished, also over its resumes")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="with --follow: seconds between two looks (default 5)")
    parser.add_argument(
        "--dir", metavar="DIR", help="where the logger's folder and LOGGER.sent.json, what it was sent, go (default RUN)"
    )
    options = parser.parse_args(argv)
    if not 0.01 <= options.every <= 3600:
        raise PrepError(errors.USAGE, "--every", f"is {options.every:g}, must be 0.01..3600")
    wait_for_run(options)
    sending = begin(options)
    with signals_noted() as came:
        try:
            send_all(options, sending, came)
        finally:
            try:
                sending.save()
            finally:
                sending.call(sending.logger.close)
    if came:
        print(f"stopped: {told(options, sending)}; the same command goes on from there", file=sys.stderr)
        return 128 + came[0]
    print(told(options, sending))
    return 0


def told(options, sending):
    text = f"{options.run}: {sending.count} lines sent to {one_line(sending.logger.place)}"
    if sending.sent != NOTHING:
        text += f", all up to step {sending.sent[0]}"
    if sending.held:
        text += f"; step {sending.held[0][0][0]} follows when the run goes on or has finished, as W&B takes a step once"
    return text


if __name__ == "__main__":
    sys.exit(run(main))
