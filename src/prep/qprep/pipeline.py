"""From the input's lines to encoded documents: in batches, in this process or in several, always in the order of the input."""

import collections
import concurrent.futures
import contextlib
import itertools
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
class Source:
    """A file of the input, or what stands for one."""

    path: str
    form: str  # its format; None where no record tells one
    told_by: tuple = None  # (key, line number) of the record that told it; None where the user or the files' names did
    records: int = 0  # that became documents

    def __str__(self):
        """What it was read as, and why, for a line of output."""
        if self.told_by:
            return f'read as {self.form}, by the key "{self.told_by[0]}" of line {self.told_by[1]}'
        if not self.form:
            return "of no format"
        return f"read as {self.form}" + (", by its .idx and .bin files" if self.form == MEGATRON else "")


@dataclass
class Outcome:
    """What became of a batch, or of everything."""

    documents: Documents
    source: int = None  # number of the file
    counts: Counts = field(default_factory=Counts)
    done: Counter = field(default_factory=Counter)
    encoded: int = 0  # documents, before `fit` took some out
    straddled: int = 0  # those of which a token straddles
    empty: int = 0  # answers without words
    empty_place: str = None  # of the first record with one
    cut: list = field(default_factory=list)  # arrays of the lengths of documents that lost their end
    unused: set = field(default_factory=set)  # keys of the records that were left alone
    templates: set = field(default_factory=set)  # names of those that were used
    template_texts: tuple = ([], None)  # what Builder.template_texts says of them
    error: tuple = None  # the arguments of the PrepError that ended the batch


class Worker:
    """Makes documents of batches of records. One per process."""

    def __init__(self, options, sources, tokenizer=None):
        self.options = options
        self.sources = sources
        self.names = dict(options.rename)
        self.tokenizer = tokenizer or Tokenizer(options.model)
        self.builder = Builder(options, self.tokenizer)
        self.builder.check_forms(sources)

    def __call__(self, batch):
        """`batch`: (number of the source, [(path, line number, record), ...])."""
        source_number, items = batch
        source = self.sources[source_number]
        counts, done, examples = Counts(), Counter(), []
        outcome = Outcome(None, source_number, counts, done)
        skip = self.options.on_bad_record == "skip"
        self.builder.begin()
        for path, number, raw in items:
            counts.lines += 1
            record, empty = None, self.builder.empty
            try:
                record = raw if isinstance(raw, dict) else parse_record(raw, self.names)
                if record is None:
                    counts.empty += 1
                    continue
                built = self.builder(source.form or recognise(record)[0], record)
                if self.builder.empty and not outcome.empty_place:
                    outcome.empty_place = f"{path} line {number}"
            except BadRecord as error:
                reason = f"{error}{of_another_format(source, record)}"
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


def of_another_format(source, record):
    """What to add to "add it" where a record lacks the key that told the format of its file."""
    if record is None or not source.told_by or source.told_by[0] in record:
        return ""
    try:
        other = f", and this one looks like {recognise(record)[0]}; a file of its own may have that format"
    except BadRecord:
        other = ""
    return (
        f", or choose the format of all records by --format NAME: {source.form} was taken from the first one "
        f"({source.path} line {source.told_by[1]}){other}"
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
    """(everything of the input as one Outcome, the Sources that it is of). Documents stand in the order of the files, and are
    numbered by records over all of them. What is wrong with the first record of a file or with Megatron's files is said before
    anything is read; otherwise the first error of the input's order is the one that counts."""
    sources = sources_of(options)
    worker = Worker(options, sources, tokenizer)  # also where others work: it checks the options
    jobs, todo = job_count(options), batches(options, sources)
    results = map(worker, todo) if jobs == 1 else spread(options, sources, todo, jobs)
    total, parts = Outcome(None), [[] for _ in sources]
    for outcome in itertools.chain(of_megatron(options, sources, tokenizer), results):
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
        source = sources[outcome.source]
        outcome.documents.groups += source.records
        source.records += outcome.counts.records
        parts[outcome.source].append(outcome.documents)
    first = 0
    for source, of_source in zip(sources, parts):
        for documents in of_source:
            documents.groups += first
        first += source.records
    total.documents = joined(list(itertools.chain(*parts)))
    tokenizer.check_documents(total.documents)
    total.template_texts = worker.builder.template_texts(total.templates)
    return total, sources


def sources_of(options):
    """The files with the format of each: what --format says, or what the first record does that can be recognised."""
    form = options.format
    if form == predecessor.DUMMY or form in predecessor.CHOOSING:  # from all files at once
        return [Source(", ".join(options.data) or "dummy", form)]
    if form != "auto":
        return [Source(path, form) for path in options.data]
    names, skip_bad = dict(options.rename), options.on_bad_record == "skip"
    return [
        Source(path, MEGATRON) if megatron.is_prefix(path) else recognised(path, names, skip_bad) for path in options.data
    ]


def recognised(path, names, skip_bad):
    """The Source of a file of records."""
    for _, number, raw in raw_records([path]):
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
        return Source(path, form, (key, number))
    return Source(path, None)


def records_of(options, source):
    """Yields (path, line number, bytes, text or record) of all records of a source."""
    if source.form == predecessor.DUMMY:
        rows = predecessor.dummy_records(options.seq_len, options.samples)
        return ((source.path, i, row) for i, row in enumerate(rows, start=1))
    if source.form in predecessor.CHOOSING:
        rows = [row for row in raw_records(options.data) if row[2].strip()]
        return iter(predecessor.chosen(source.form, rows, options.seed, options.samples, source.path))
    return raw_records([source.path])


def batches(options, sources):
    """Yields what a Worker takes. A batch is of one file, and so of one format."""
    for number, source in enumerate(sources):
        if source.form != MEGATRON:
            records = records_of(options, source)
            while batch := list(itertools.islice(records, BATCH)):
                yield number, batch


def job_count(options):
    if options.jobs:
        return options.jobs
    size = sum(os.path.getsize(path) for path in options.data if os.path.isfile(path))
    return len(os.sched_getaffinity(0)) if size >= SEVERAL_FROM_BYTES else 1


def spread(options, sources, todo, jobs):
    """The outcomes of several processes in the order of their batches, never more than a few batches ahead."""
    start = multiprocessing.get_context("spawn")
    waiting, failure = collections.deque(), None
    with concurrent.futures.ProcessPoolExecutor(jobs, start, set_up, (options, sources)) as pool:
        try:
            try:
                for batch in todo:
                    with signals_held():
                        waiting.append(pool.submit(work, batch))
                    if len(waiting) > 3 * jobs:
                        yield waiting.popleft().result()
            except PrepError as error:  # of a file that cannot be read on: what came before it counts first
                failure = error
            while waiting:
                yield waiting.popleft().result()
            if failure:
                raise failure
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


def set_up(options, sources):
    threading.Thread(target=end_with_parent, daemon=True).start()  # which a killed parent cannot ask for
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one core's work
    work.worker = Worker(options, sources)


def work(batch):
    return work.worker(batch)


def of_megatron(options, sources, tokenizer):
    """Yields the outcomes of Megatron's data sets, which need no other process: they are tokens."""
    for number, source in enumerate(sources):
        if source.form != MEGATRON:
            continue
        for documents in megatron.IndexedDataset(source.path, tokenizer.vocab_size).documents():
            if options.eos == "always":
                documents = ended(documents, tokenizer, options.model)
            outcome = Outcome(None, number, encoded=len(documents))
            outcome.counts.records = outcome.counts.lines = len(documents)
            outcome.documents = fit(documents, options, outcome)
            yield outcome


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
