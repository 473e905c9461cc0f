#!/usr/bin/env python3
"""qshard-prep: training data to the token file that `qshard train`, `eval` and `sample` read."""

import argparse
import json
import os
import sys

from qprep.packages import need

need("numpy", "h5py", "jinja2", "tokenizers")

import numpy as np

from qprep import errors, predecessor
from qprep.chat import RESERVED, ROLES
from qprep.errors import OneLineParser, PrepError, run
from qprep.files import finished, refuse_existing
from qprep.formats import ALL_FORMATS, FORMATS, MEGATRON, OPENING
from qprep.model_config import check_model_folder, read_model_config
from qprep.packing import METHODS
from qprep.parts import fingerprints, split_off, taken
from qprep.pipeline import read_documents
from qprep.preview import show
from qprep.template import TURNS
from qprep.tokenfile import arrange, template_attributes, write_token_file
from qprep.tokens import Tokenizer, joined

TAKE_LIMIT = 1000
DESCRIPTION = "Makes the token files that qshard train, eval and sample read."
FORMATS_HELP = """\
formats, told by the keys of each file's first record or by --format:
  messages    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}], "tools": [...]}
  sharegpt    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], "system": ...}
              both are written with the model's chat template; the assistant's turns are learned; beside the messages
              may stand "system", "tools" and "chat_template_kwargs"
  alpaca      {"instruction", "input", "output"}: the output is learned
  completion  {"prompt", "completion"}, texts or lists of messages: the completion is learned
  text        {"text"}: everything is learned
  tokens      {"input_ids", "labels"} with masks: what its labels say
  megatron    PREFIX of PREFIX.idx and PREFIX.bin: everything is learned
  fsdp_qlora:alpaca, :alpaca_sample, :guanaco, :sql, :orca_math, :dummy
              the data sets of fsdp_qlora's train.py with its text, mask and choice of samples

examples:
  qshard-prep --model HF_DIR data.jsonl --preview 2
  qshard-prep --model HF_DIR data.jsonl -o train.h5 --seq-len 2048 --pack --eval-out eval.h5 --eval-fraction 0.05
  qshard-prep --model HF_DIR faq.jsonl --rename question=prompt --rename answer=completion --chat -o train.h5
  qshard-prep --model HF_DIR chat.jsonl alpaca.jsonl book.jsonl --take chat.jsonl=2 --take book.jsonl=0.1 -o train.h5
  qshard-prep --model HF_DIR --format fsdp_qlora:dummy -o dummy.h5

One pass, in order, and the same bytes for the same input. Exit codes: 0 done, 2 usage, 3 bad input, 4 output."""


def parse_options(argv):
    parser = OneLineParser(
        prog="qshard-prep",
        description=DESCRIPTION,
        epilog=FORMATS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "data",
        nargs="*",
        metavar="DATA",
        help="JSON lines or one JSON array; for megatron the PREFIX of .idx and .bin; several may be of several formats",
    )
    add(
        "--model",
        required=True,
        metavar="HF_DIR",
        help="model directory: tokenizer.json, config.json, chat template",
    )
    add("-o", "--output", metavar="TRAIN.h5", help="token file to write")
    add("--overwrite", action="store_true", help="replace existing outputs")
    add(
        "--preview",
        type=int,
        default=0,
        metavar="N",
        help="print N sequences, what is not learned dimmed or in ⟦⟧",
    )

    add = parser.add_argument_group("records").add_argument
    add(
        "--format",
        choices=("auto", *ALL_FORMATS),
        default="auto",
        metavar="NAME",
        help="kind of all records, see below (default: of each file by its keys)",
    )
    add(
        "--rename",
        type=names_of,
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="read the records' key OLD as NEW, as in question=prompt; may be given again",
    )
    add(
        "--take",
        type=take_of,
        action="append",
        default=[],
        metavar="FILE=N",
        help="take the records of DATA's FILE N times, or a part of them: 3, 0.1, 1.5; may be given for each FILE",
    )
    add("--on-bad-record", choices=("stop", "skip"), default="stop", help="(default stop)")
    add(
        "--prompts",
        action="store_true",
        help="prompts for `qshard sample`: nothing learned, open for an answer",
    )
    add(
        "--samples",
        type=int,
        metavar="N",
        help=f"fsdp_qlora's alpaca_sample, orca_math, dummy: how many (default {predecessor.SAMPLES})",
    )
    add("--jobs", type=int, default=0, metavar="N", help="processes (default: all cores, if it pays)")

    add = parser.add_argument_group("what is learned").add_argument
    add(
        "--train-roles",
        type=roles_of,
        metavar="ROLES",
        help=f"of a conversation: some of {','.join(ROLES)} (default assistant)",
    )
    add(
        "--turns",
        choices=TURNS,
        help="of a conversation: all learned turns in one document, each in its own, or only the last; auto (default): "
        "all, and each where the template changes what it wrote before",
    )
    add("--train-on-inputs", action="store_true", help="learn prompts and frames as well")
    add(
        "--eos",
        choices=("auto", "always", "never"),
        default="auto",
        help="the learned end-of-text token behind a document: where nothing closes it (auto), always, or never",
    )

    add = parser.add_argument_group("chat template").add_argument
    add("--chat-template", metavar="FILE", help="Jinja file to use instead of the model's own")
    add(
        "--template-arg",
        type=variable_of,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the template, as enable_thinking=false; the value is JSON or a text",
    )
    add(
        "--chat",
        action="store_true",
        help="write alpaca and completion records with the chat template instead of as plain text",
    )

    add = parser.add_argument_group("lengths").add_argument
    add(
        "--seq-len",
        type=int,
        default=512,
        metavar="N",
        help="longest sequence in tokens (default 512)",
    )
    add(
        "--long",
        choices=("truncate", "drop", "split"),
        default="truncate",
        help="documents longer than --seq-len: keep the beginning, leave out, or (text and tokens) cut in pieces",
    )
    add(
        "--pack",
        action="store_true",
        help="documents share sequences; attention still ends at their borders",
    )
    add(
        "--pack-by",
        choices=METHODS,
        help="pack in the order of the input (default), or each into the fullest sequence with room, longest first",
    )

    add = parser.add_argument_group("held-out part").add_argument
    add("--eval-out", metavar="EVAL.h5", help="token file of the held-out part")
    add(
        "--eval-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part of the records held out, 0..0.9",
    )
    add("--seed", type=int, default=42, help="chooses the held-out records and those of --take (default 42)")
    options = parser.parse_args(argv)
    options.pack_by = options.pack_by or ("order" if options.pack else None)
    options.pack = options.pack_by is not None
    check_options(options)
    return options


def roles_of(text):
    roles = tuple(text.split(","))
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(ROLES)}")
    return roles


def names_of(text):
    old, equals, new = text.partition("=")
    if not old or not equals or not new:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new


def take_of(text):
    path, _, number = text.rpartition("=")
    try:
        times = float(number)
    except ValueError:
        times = 0.0
    if not path or not 0 < times <= TAKE_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE=N with a number N above 0 and up to {TAKE_LIMIT}, as 3 or 0.1")
    return path, times


def variable_of(text):
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in RESERVED:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with the name of a free variable")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def check_options(options):
    """Whatever can be known to be wrong before any file is read."""
    predecessor.need_no_data(options)
    if not options.output and not options.preview:
        raise PrepError(
            errors.USAGE, "qshard-prep", "nothing to do: give -o TRAIN.h5 or --preview N"
        )
    for name, value, low, high in (
        ("--seq-len", options.seq_len, 2, 1 << 20),
        ("--preview", options.preview, 0, 1 << 30),
        ("--jobs", options.jobs, 0, 1024),
        ("--samples", 1 if options.samples is None else options.samples, 1, 1 << 40),
        ("--seed", options.seed, 0, (1 << 63) - 1),
        ("--eval-fraction", options.eval_fraction, 0.0, 0.9),
    ):
        if not low <= value <= high:
            raise PrepError(errors.USAGE, name, f"is {value}, must be {low}..{high}")
    if bool(options.eval_out) != (options.eval_fraction != 0.0):
        raise PrepError(
            errors.CONFIG_PAIR,
            "--eval-out",
            "goes with an --eval-fraction above 0, and only with it",
        )
    if options.eval_out and not options.output:
        raise PrepError(errors.CONFIG_PAIR, "--eval-out", "needs -o for the other part")
    for side, names in enumerate(zip(*options.rename)):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise PrepError(errors.CONFIG_PAIR, "--rename", f"{twice} is given twice as {('OLD', 'NEW')[side]}")
    check_take(options)
    if options.prompts:
        check_prompts(options)
    if options.train_on_inputs and (options.train_roles or options.turns):
        raise PrepError(
            errors.CONFIG_PAIR,
            "--train-on-inputs",
            "learns everything, so it goes with neither --train-roles nor --turns",
        )
    outputs = [path for path in (options.output, options.eval_out) if path]
    if len({os.path.abspath(path) for path in outputs}) != len(outputs):
        raise PrepError(errors.CONFIG_PAIR, "--eval-out", "is the same file as -o; name another")
    inputs = [name + end for name in options.data for end in ("", ".idx", ".bin")]
    for path in outputs:
        refuse_existing(path, options.overwrite, inputs)


def check_take(options):
    """--take names each DATA file once at most, and no file is there twice where that would say something else."""
    names = [path for path, _ in options.take]
    if names and options.format in (predecessor.DUMMY, *predecessor.CHOOSING):
        raise PrepError(errors.CONFIG_PAIR, "--take", f"does not go with {options.format}, which chooses its records itself")
    for name in names:
        if name not in options.data:
            known = named(dict.fromkeys(options.data))
            raise PrepError(errors.USAGE, "--take", f"{name} is no DATA file of this command; write one as it stands there: {known}")
        if names.count(name) > 1:
            raise PrepError(errors.CONFIG_PAIR, "--take", f"{name} is given twice; keep one")
    files = [os.path.realpath(name) for name in options.data]
    twice = next((name for name, file in zip(options.data, files) if files.count(file) > 1), None)
    if twice and (names or options.eval_out):
        why = "so what --eval-out holds of it would be trained on" if options.eval_out else "and --take does not say which"
        raise PrepError(errors.CONFIG_PAIR, twice, f"is there twice, {why}; name it once, with --take {twice}=2")


def check_prompts(options):
    """A prompt is one whole sequence of which nothing is learned."""
    for name, given in (
        ("--eval-out", options.eval_out),
        ("--pack", options.pack),
        ("--long", options.long != "truncate"),
        ("--eos", options.eos != "auto"),
        ("--train-roles", options.train_roles),
        ("--turns", options.turns),
        ("--train-on-inputs", options.train_on_inputs),
    ):
        if given:
            raise PrepError(
                errors.CONFIG_PAIR,
                "--prompts",
                f"does not go with {name}: a prompt is one whole sequence of which nothing is learned",
            )


def check_usable(options, outcome, forms):
    """Training on nothing is refused, with the reason. `forms`: the formats of the files."""
    if len(outcome.documents):
        return
    counts, done = outcome.counts, outcome.done
    where = ", ".join(options.data) or options.format
    if not counts.records:
        raise PrepError(
            errors.INPUT_VALUE,
            where,
            f"no usable record in {counts.lines} lines ({counts.empty} empty, {counts.bad} bad)"
            + "".join(f"; {line}" for line in left_out(counts)[:1]),
        )
    if options.prompts:
        reason = f"every prompt is empty or longer than --seq-len={options.seq_len}; raise it"
    elif done[OPENING] and done["without a turn to learn"] == counts.records:
        reason = "the assistant's messages have nothing before them that they answer"
    elif done["without a turn to learn"] == counts.records:
        roles = " or ".join(options.train_roles or ("assistant",))
        reason = f"no record has {'an' if roles[0] in 'aeiou' else 'a'} {roles} message, or only such with \"weight\": 0 or \"train\": false"
    elif done["truncated"] or done["dropped, too long"]:
        reason = f"what is to be learned lies behind --seq-len={options.seq_len}; raise it"
    elif forms <= {"tokens", MEGATRON}:
        reason = "labels and masks allow no token but a document's first, which nothing comes before"
    elif forms == {"text"}:
        reason = "the texts are empty"
    else:
        reason = "the answers are empty"
    raise PrepError(
        errors.INPUT_VALUE,
        where,
        f"nothing is left of {counts.records} records: {reason}",
    )


def report(path, arrays, options):
    sequences, tokens = len(arrays["seq_targets"]), len(arrays["tokens"])
    longest = int((arrays["seq_offsets"][1:] - arrays["seq_offsets"][:-1]).max())
    print(
        f"{path}: {sequences} sequences of up to {longest} tokens, {len(arrays['doc_offsets']) - 1} documents, "
        f"{tokens} tokens, {int(arrays['seq_targets'].sum())} of them learned"
        + (f", {tokens / (sequences * options.seq_len):.0%} full" if options.pack else "")
    )


def print_format(sources):
    """What files of one format were read as, by the first that told it."""
    for source in sources:
        if source.form:
            print(f"{source.path}: {source}" + ("; --format names another" if source.told_by else ""))
            return


def print_files(options, sources, files):
    """What became of each file. `files`: the documents of each in the training part."""
    times = dict(options.take)
    for source, documents in zip(sources, files):
        print(
            f"{source.path}: {of(source.records, 'record', 'records')} {source}"
            + (f", taken {times[source.path]:g} times" if source.path in times else "")
            + f": {of(len(documents), 'document', 'documents')}"
        )


def show_files(options, sources, files, table):
    """A preview of each file: the first sequences of all are of the first one alone."""
    for source, documents in zip(sources, files):
        print(f"=== {source.path}: {source}")
        show(arrange(documents, options.seq_len, options.pack_by), table, options.preview)


def left_out(counts, limit=10):
    """A line for each reason for which records were left out, the commonest first."""
    found = sorted(counts.reasons.values(), key=lambda noted: -noted[0])
    lines = [
        errors.one_line(f"{of(count, 'record is', 'records are')} bad and left out: {reason} (first: {place})")
        for count, reason, place in found[:limit]
    ]
    rest = sum(count for count, _, _ in found[limit:])
    return lines + ([f"{of(rest, 'record is', 'records are')} bad and left out for other reasons"] if rest else [])


def of(count, one, many):
    return f"{count} {one if count == 1 else many}"


def warn_of_bad(counts):
    """A few bad records are to be expected of much data; many have one cause."""
    given = counts.records + counts.bad
    if counts.bad > 0.05 * given:
        print(
            f"warning: {counts.bad} of {given} records ({counts.bad / given:.0%}) are left out as bad; see whether format and keys "
            "are the right ones (--format, --rename)",
            file=sys.stderr,
        )


def warn_of_straddling(outcome):
    """A mask that misses a token in most documents has one cause, and it is not in the records."""
    if 2 * outcome.straddled > outcome.encoded:
        print(
            f"warning: in {outcome.straddled} of {outcome.encoded} documents a token reaches over the border of what is "
            "learned, so it is not learned: as a rule an answer's first word, where what stands before it ends in a space; "
            "end prompts and template without it and begin answers with it (docs/data.md, Chat templates and masks)",
            file=sys.stderr,
        )


def warn_of_cut(options, outcome, limit):
    """A model does not learn to stop from documents without an end. `limit`: the positions that the model knows, or None."""
    if not outcome.cut or options.format == predecessor.DUMMY:  # whose rows are made to be cut
        return
    lengths = np.concatenate(outcome.cut)
    longest = int(lengths.max())
    enough = -(-longest // 64) * 64
    remedy = f"--seq-len {min(enough, limit or enough)} keeps all"
    if limit and longest > limit:
        remedy = f"--seq-len {limit} keeps all but {np.count_nonzero(lengths > limit)}, " if limit > options.seq_len else ""
        remedy += f"more than {limit} positions the model does not know: cut those where a part ends"
    print(
        f"warning: documents longer than --seq-len={options.seq_len} lose their end, and so the token that says where to stop: "
        f"{len(lengths)} of {outcome.encoded} (their median length {int(np.median(lengths))}, the longest {longest}); {remedy}",
        file=sys.stderr,
    )


class Copies:
    """Documents that the input holds more than once, all tokens and what is learned of them alike."""

    def __init__(self, kept, held):
        marks = fingerprints(kept)
        of_held = fingerprints(held) if held is not None else marks[:0]
        self.held = len(of_held)
        self.held_too = np.count_nonzero(np.isin(of_held, marks))
        self.count = len(marks) + len(of_held) - len(np.unique(np.concatenate([marks, of_held])))

    def report(self):
        if self.count:
            print(f"{of(self.count, 'document repeats another', 'documents repeat others')} word for word")
        if self.held_too:
            print(
                f"warning: {self.held_too} of {of(self.held, 'held-out document', 'held-out documents')} stand in the training part "
                "as well, so eval_loss is too good; remove repeated records first, as awk '!seen[$0]++' does",
                file=sys.stderr,
            )


def named(keys, limit=20):
    """Keys of records, or names of files, for a line of output."""
    shown = [errors.one_line(key) for key in sorted(keys)[:limit]]
    return ", ".join(shown) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def write_outputs(options, parts, table, attributes):
    """Writes every part under a temporary name before the first of them gets its own."""
    if not parts:
        return
    path, arrays = parts[0]
    with finished(path) as temporary:
        write_token_file(temporary, arrays, table, attributes)
        write_outputs(options, parts[1:], table, attributes)
    report(path, arrays, options)


def main(argv):
    options = parse_options(argv)
    check_model_folder(options.model)
    limit = read_model_config(options.model).get("max_position_embeddings")
    limit = limit if type(limit) is int else None
    if limit is not None and options.seq_len > limit:
        raise PrepError(
            errors.USAGE,
            "--seq-len",
            f"is {options.seq_len}, but the model knows {limit} positions",
        )
    tokenizer = Tokenizer(options.model)
    outcome, sources = read_documents(options, tokenizer)
    mixed = len({source.form for source in sources if source.form}) > 1
    by_file = mixed or options.take
    if options.format == "auto" and not by_file:
        print_format(sources)
    check_usable(options, outcome, {source.form for source in sources if source.form})
    kept, held = split_off(outcome.documents, options.eval_fraction, options.seed)
    outcome.documents = None  # which are another copy, where some are held out
    copies = Copies(kept, held)
    files = taken(kept, sources, dict(options.take), options.seed) if by_file else [kept]
    if options.take:
        kept = joined(files)
        if held is not None:  # of which nothing is evaluated twice
            once = {path: min(times, 1) for path, times in options.take}
            held = joined(taken(held, sources, once, options.seed))

    table = tokenizer.decode_table()
    arrays = arrange(kept, options.seq_len, options.pack_by)
    parts = [(options.output, arrays)] if options.output else []
    if held is not None:
        parts.append((options.eval_out, arrange(held, options.seq_len, options.pack_by)))
    write_outputs(
        options,
        parts,
        table,
        {
            "vocab_size": tokenizer.vocab_size,
            "seq_len": options.seq_len,
            "packed": int(options.pack),
            "tokenizer_sha256": tokenizer.sha256,
            **template_attributes(*outcome.template_texts),
            "source": ", ".join(os.path.basename(path) for path in options.data) or options.format,
        },
    )
    counts = outcome.counts
    notes = [f"{n} {what}" for what, n in outcome.done.items() if n]
    print(
        f"{counts.records} records of {counts.lines} lines ({counts.empty} empty, {counts.bad} bad skipped)"
        + (": " + ", ".join(notes) if notes else "")
    )
    if by_file:
        print_files(options, sources, files)
    for line in left_out(counts):
        print(line)
    if outcome.empty:
        print(
            f"{of(outcome.empty, 'answer is', 'answers are')} empty: what is learned there is to stop at once "
            f"(first: {outcome.empty_place})"
        )
    copies.report()
    if outcome.unused:
        print(f"keys not used: {named(outcome.unused)}")
    warn_of_bad(counts)
    warn_of_cut(options, outcome, limit)
    warn_of_straddling(outcome)
    if mixed and options.preview:
        show_files(options, sources, files, table)
    else:
        show(arrays, table, options.preview)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
