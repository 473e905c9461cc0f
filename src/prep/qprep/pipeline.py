"""From the input's lines to encoded documents: in batches, in this process or in several, always in the order of the input."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from . import errors, megatron, predecessor
from .errors import BadRecord, PrepError
from .formats import MEGATRON, Builder, recognise
from .records import Counts, parse_record, raw_records
from .tokenfile import ranges
from .tokens import Documents, Example, Tokenizer, joined

BATCH = 1024  # records that are encoded together
SEVERAL_FROM_BYTES = 32 << 20  # smaller inputs are done before another process has started


@dataclass
class Outcome:
    """What became of a batch, or of everything."""

    documents: Documents
    counts: Counts = field(default_factory=Counts)
    done: Counter = field(default_factory=Counter)
    encoded: int = 0  # documents, before `fit` took some out
    straddled: int = 0  # those of which a token straddles
    empty: int = 0  # answers without words
    empty_place: str = None  # of the first record with one
    cut: list = field(default_factory=list)  # arrays of the lengths of documents that lost their end
    unused: set = field(default_factory=set)  # keys of the records that were left alone
    templates: set = field(default_factory=set)  # names of those that were used
    forms: set = field(default_factory=set)
    template_texts: tuple = ([], None)  # what Builder.template_texts says of them
    error: tuple = None  # the arguments of the PrepError that ended the batch


class Worker:
    """Makes documents of batches of records. One per process."""

    def __init__(self, options, form, tokenizer=None, told_by=None):
        """`told_by`: (key, place) of the record that told the format; None where the user did."""
        self.options = options
        self.form = form
        self.told_by = told_by
        self.names = dict(options.rename)
        self.tokenizer = tokenizer or Tokenizer(options.model)
        self.builder = Builder(options, self.tokenizer)
        self.builder.check_form(form)

    def __call__(self, batch):
        counts, done, examples = Counts(), Counter(), []
        outcome = Outcome(None, counts, done)
        skip = self.options.on_bad_record == "skip"
        self.builder.begin()
        for path, number, raw in batch:
            counts.lines += 1
            record, empty = None, self.builder.empty
            try:
                record = raw if isinstance(raw, dict) else parse_record(raw, self.names)
                if record is None:
                    counts.empty += 1
                    continue
                built = self.builder(self.form, record)
                if self.builder.empty and not outcome.empty_place:
                    outcome.empty_place = f"{path} line {number}"
            except BadRecord as error:
                reason = f"{error}{self.of_another_format(record)}"
                if not skip:
                    outcome.error = (
                        errors.INPUT_VALUE,
                        f"{path}:{number}",
                        f"{reason} (or give --on-bad-record=skip)",
                    )
                    break
                counts.leave_out(reason, f"{path} line {number}")
                self.builder.empty = empty
                continue
            except PrepError as error:
                outcome.error = error.args_of
                break
            for example in built:
                example.group = counts.records
                done["without a turn to learn"] += is_unlearned(example, self.options)
            counts.records += 1
            examples.extend(built)
        done.update(self.builder.done)
        outcome.unused, outcome.templates = self.builder.unused, self.builder.used
        outcome.empty = self.builder.empty
        encoded, straddling = self.tokenizer.encode(examples)
        outcome.encoded, outcome.straddled = len(encoded), np.count_nonzero(straddling)
        done["straddling"] += int(straddling.sum())
        outcome.documents = fit(encoded, self.options, outcome)
        return outcome


    def of_another_format(self, record):
        """What to add to "add it" where a record lacks the key that told the format of all."""
        if record is None or not self.told_by or self.told_by[0] in record:
            return ""
        try:
            other = f", and this one looks like {recognise(record)[0]}"
        except BadRecord:
            other = ""
        return (
            f", or choose the format of all records by --format NAME: {self.form} was taken from the first one "
            f"({self.told_by[1]}){other}"
        )


def is_unlearned(example, options):
    return (
        isinstance(example, Example)
        and not (options.prompts or example.spans)
        and example.prompt is None
    )


def fit(documents, options, outcome):
    """The documents, cut so that they fit into seq_len, without those that (but for prompts) teach nothing."""
    limit, lengths, done = options.seq_len, documents.lengths, outcome.done
    starts = np.concatenate([[0], np.cumsum(lengths)])
    learned = documents.learned.copy()
    nonempty = lengths > 0
    learned[starts[:-1][nonempty]] = False  # nothing comes before a document's first token
    long = lengths > limit
    begins, ends, groups = starts[:-1], starts[1:], documents.groups
    if long.any():
        if options.prompts or options.long == "drop":
            done["dropped, too long"] += int(long.sum())
            begins, ends, groups = begins[~long], ends[~long], groups[~long]
        elif options.long == "truncate":
            done["truncated"] += int(long.sum())
            outcome.cut.append(lengths[long])
            ends = np.minimum(ends, begins + limit)
        else:
            done["split"] += int(long.sum())
            pieces = np.maximum(-(-lengths // limit), 1)
            within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            begins = np.repeat(begins, pieces) + within * limit
            ends = np.minimum(begins + limit, np.repeat(ends, pieces))
            groups = np.repeat(groups, pieces)
            learned[begins[ends > begins]] = False
    sums = np.concatenate([[0], np.cumsum(learned)])
    if options.prompts:
        kept = ends > begins
        done["dropped, empty"] += int((~kept).sum())
    else:
        kept = sums[ends] > sums[begins]
        done["dropped, nothing to learn"] += int((~kept).sum())
    begins, ends = begins[kept], ends[kept]
    taken = ranges(begins, ends)
    return Documents(documents.tokens[taken], learned[taken], ends - begins, groups[kept])


def read_documents(options, tokenizer):
    """Everything of the input as one Outcome, and a line that says how its format was told, or None."""
    if options.format == MEGATRON or (
        options.format == "auto" and all(megatron.is_prefix(path) for path in options.data)
    ):
        told = f"{options.data[0]}: read as megatron, by its .idx and .bin files"
        told = told if options.format == "auto" else None
        return read_megatron(options, tokenizer), told
    if options.format == predecessor.DUMMY:
        rows = predecessor.dummy_records(options.seq_len, options.samples)
        source = (("dummy", i, row) for i, row in enumerate(rows, start=1))
        return gather(options, options.format, tokenizer, batches(source)), None
    source = raw_records(options.data)
    form, told, told_by, before = options.format, None, None, []
    if form == "auto":
        form, told_by, before = detect(source, dict(options.rename), options.on_bad_record == "skip")
    elif form in predecessor.CHOOSING:
        rows = [row for row in source if row[2].strip()]
        source = iter(
            predecessor.chosen(form, rows, options.seed, options.samples, ", ".join(options.data))
        )
    if form is None:  # no usable record at all: the first batch says what was wrong
        form = "text"
    if told_by:
        path, number, _ = before[-1]
        told = f'{path}: read as {form}, by the key "{told_by[0]}" of line {number}; --format names another'
    return gather(options, form, tokenizer, batches(chain_of(before, source)), told_by), told


def chain_of(before, source):
    yield from before
    yield from source


def detect(source, names, skip_bad):
    """(format, (the key that told it, the place of its record), the records read so far): by the first record that can be
    recognised."""
    before = []
    for path, number, raw in source:
        before.append((path, number, raw))
        try:
            record = parse_record(raw, names)
            if record is None:
                continue
            form, key = recognise(record)
        except BadRecord as error:
            if not skip_bad:
                raise PrepError(
                    errors.INPUT_VALUE, f"{path}:{number}", f"{error} (or give --on-bad-record=skip)"
                ) from error
            continue
        return form, (key, f"{path} line {number}"), before
    return None, None, before


def batches(source):
    batch = []
    for item in source:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def gather(options, form, tokenizer, source, told_by=None):
    """All batches, one after the other, as one Outcome. The first error of the input's order is the one that counts."""
    worker = Worker(options, form, tokenizer, told_by)  # also where others work: it checks the options
    jobs = job_count(options)
    results = map(worker, source) if jobs == 1 else spread(options, form, told_by, source, jobs)
    total, parts, groups = Outcome(None, forms={form}), [], 0
    for outcome in results:
        if outcome.error:
            raise PrepError(*outcome.error)
        total.counts.add(outcome.counts)
        total.done.update(outcome.done)
        total.encoded += outcome.encoded
        total.straddled += outcome.straddled
        total.empty += outcome.empty
        total.empty_place = total.empty_place or outcome.empty_place
        total.cut += outcome.cut
        total.unused |= outcome.unused
        total.templates |= outcome.templates
        outcome.documents.groups += groups
        groups += outcome.counts.records
        parts.append(outcome.documents)
    total.documents = joined(parts)
    tokenizer.check_documents(total.documents)
    total.template_texts = worker.builder.template_texts(total.templates)
    return total


def job_count(options):
    if options.jobs:
        return options.jobs
    size = sum(os.path.getsize(path) for path in options.data if os.path.isfile(path))
    return len(os.sched_getaffinity(0)) if size >= SEVERAL_FROM_BYTES else 1


def spread(options, form, told_by, source, jobs):
    """The outcomes of several processes in the order of their batches, never more than a few batches ahead."""
    start = multiprocessing.get_context("spawn")
    waiting = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(jobs, start, set_up, (options, form, told_by)) as pool:
        try:
            for batch in source:
                with signals_held():
                    waiting.append(pool.submit(work, batch))
                if len(waiting) > 3 * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.BrokenExecutor as error:
            raise PrepError(
                errors.MEMORY,
                "--jobs",
                f"one of {jobs} processes was ended, perhaps for want of memory; give fewer",
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def signals_held():
    """For starting processes: a Ctrl-C goes to all of a terminal's processes, and a pool whose processes are ended by others
    waits for ever. They inherit that it is blocked; this process alone takes it, afterwards, and closes its pool. It has
    threads of others' (tokenizers, numpy) that take a signal all the same, so that the handlers wait, too."""
    came = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *errors.ENDING)}
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        for number in came:
            os.kill(os.getpid(), number)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def set_up(options, form, told_by):
    threading.Thread(target=end_with_parent, daemon=True).start()  # which a killed parent cannot ask for
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one core's work
    work.worker = Worker(options, form, told_by=told_by)


def work(batch):
    return work.worker(batch)


def read_megatron(options, tokenizer):
    Builder(options, tokenizer).check_form(MEGATRON)
    total, parts = Outcome(None, forms={MEGATRON}), []
    for path in options.data:
        data = megatron.IndexedDataset(path, tokenizer.vocab_size)
        for documents in data.documents():
            if options.eos == "always":
                documents = ended(documents, tokenizer, options.model)
            documents.groups += total.counts.records
            total.encoded += len(documents)
            parts.append(fit(documents, options, total))
        total.counts.records += len(data.borders) - 1
        total.counts.lines += len(data.borders) - 1
    total.documents = joined(parts)
    return total


def ended(documents, tokenizer, model):
    """The documents, each with the end-of-text token behind it where it does not stand there."""
    if tokenizer.eos is None:
        raise PrepError(errors.INPUT_VALUE, model, "names no eos_token, which --eos always needs")
    ends = np.cumsum(documents.lengths)
    last = np.where(documents.lengths > 0, documents.tokens[np.maximum(ends - 1, 0)], tokenizer.eos)
    open_ended = last != tokenizer.eos
    return Documents(
        np.insert(documents.tokens, ends[open_ended], tokenizer.eos).astype("<u4"),
        np.insert(documents.learned, ends[open_ended], True),
        documents.lengths + open_ended,
        documents.groups,
    )
