#!/usr/bin/env python3
"""qshard-prep: JSON lines to the token file that `qshard train`, `eval` and `sample` read.

    qshard_prep.py --model HF_DIR data.jsonl -o train.h5 --eval-out eval.h5 --eval-fraction 0.05
    qshard_prep.py --model HF_DIR data.jsonl --preview 2

Formats (told by the keys of a record, or --format):
  messages  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, written with the model's chat
            template; learned are the assistant's turns with the token that closes them
  alpaca    {"instruction", "input", "output"}; learned are the output and the end of text
  text      {"text"}; everything is learned
One pass, in order, and the same bytes for the same input. docs/data.md tells the rest.
"""

import hashlib
import os
import sys
from collections import Counter

from qprep import errors
from qprep.errors import BadRecord, OneLineParser, PrepError, run
from qprep.files import finished, read_json, refuse_existing
from qprep.preview import show
from qprep.records import FORMATS, Counts, read_records
from qprep.template import ChatTemplate, load_template
from qprep.tokenfile import arrange, write_token_file
from qprep.tokens import Document, Example, Tokenizer

BATCH = 1024  # records that are encoded together, on all cores

# The wording of Stanford Alpaca's training data, which models tuned on it expect.
ALPACA_HEAD = "Below is an instruction that describes a task"
ALPACA_INPUT = ", paired with an input that provides further context"
ALPACA_TAIL = ". Write a response that appropriately completes the request.\n\n"


def parse_options(argv):
    parser = OneLineParser(
        prog="qshard-prep", description="JSON lines to token files", allow_abbrev=False
    )
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA.jsonl", help="one JSON object a line")
    add(
        "--model",
        required=True,
        metavar="HF_DIR",
        help="model directory: tokenizer.json, config.json, chat template",
    )
    add("-o", "--output", metavar="TRAIN.h5", help="token file to write")
    add("--eval-out", metavar="EVAL.h5", help="token file of the held-out part")
    add(
        "--eval-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part of the documents held out, 0..0.9",
    )
    add("--seed", type=int, default=42, help="chooses the held-out documents (default 42)")
    add(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="kind of the records (default: by their keys)",
    )
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
        help="documents longer than --seq-len: keep the beginning, leave out, or (text only) cut in pieces",
    )
    add(
        "--pack",
        action="store_true",
        help="documents share sequences; attention still ends at their borders",
    )
    add(
        "--prompts",
        action="store_true",
        help="prompts for `qshard sample`: nothing learned, open for an answer",
    )
    add(
        "--preview",
        type=int,
        default=0,
        metavar="N",
        help="print N sequences, what is not learned dimmed or in ⟦⟧",
    )
    add("--on-bad-record", choices=("stop", "skip"), default="stop", help="(default stop)")
    add("--chat-template", metavar="FILE", help="Jinja file to use instead of the model's own")
    add("--overwrite", action="store_true", help="replace existing outputs")
    options = parser.parse_args(argv)
    check_options(options)
    return options


def check_options(options):
    """Whatever can be known to be wrong before any file is read."""
    if not options.output and not options.preview:
        raise PrepError(
            errors.USAGE, "qshard-prep", "nothing to do: give -o TRAIN.h5 or --preview N"
        )
    if not 2 <= options.seq_len <= 1 << 20:
        raise PrepError(errors.USAGE, "--seq-len", f"is {options.seq_len}, must be 2..{1 << 20}")
    if options.preview < 0:
        raise PrepError(errors.USAGE, "--preview", f"is {options.preview}, must not be negative")
    if bool(options.eval_out) != (options.eval_fraction != 0.0):
        raise PrepError(
            errors.CONFIG_PAIR,
            "--eval-out",
            "goes with an --eval-fraction above 0, and only with it",
        )
    if not 0.0 <= options.eval_fraction <= 0.9:
        raise PrepError(
            errors.USAGE, "--eval-fraction", f"is {options.eval_fraction}, must be 0..0.9"
        )
    if options.eval_out and not options.output:
        raise PrepError(errors.CONFIG_PAIR, "--eval-out", "needs -o for the other part")
    if options.prompts and (options.eval_out or options.pack or options.long != "truncate"):
        raise PrepError(
            errors.CONFIG_PAIR,
            "--prompts",
            "goes with none of --eval-out, --pack, --long: a prompt is one whole sequence",
        )
    outputs = [path for path in (options.output, options.eval_out) if path]
    if len({os.path.abspath(path) for path in outputs}) != len(outputs):
        raise PrepError(errors.CONFIG_PAIR, "--eval-out", "is the same file as -o; name another")
    for path in outputs:
        refuse_existing(path, options.overwrite, options.data)


class Builder:
    """Makes an Example of a record: its text and which characters of it are learned."""

    def __init__(self, options, tokenizer):
        self.options = options
        self.tokenizer = tokenizer
        self.source, specials = load_template(options.model, options.chat_template)
        self.template = None
        if self.source is not None:
            self.template = ChatTemplate(self.source, specials, tokenizer.special_texts())
        self.forms = set()

    def __call__(self, form, record):
        self.forms.add(form)
        if form != "messages" and not self.options.prompts and self.tokenizer.eos is None:
            raise PrepError(
                errors.INPUT_VALUE,
                self.options.model,
                "names no eos_token, which has to end a document; "
                "add it to tokenizer_config.json",
            )
        return getattr(self, form)(record)

    def messages(self, record):
        if self.template is None:
            raise PrepError(
                errors.INPUT_MISSING,
                self.options.model,
                "the model has no chat template, which records "
                "with messages need; give --chat-template FILE",
            )
        if self.options.long == "split":
            raise PrepError(
                errors.CONFIG_PAIR,
                "--long",
                "split is for text only; a piece of a conversation is none",
            )
        messages, tools = record["messages"], record.get("tools")
        if self.options.prompts:
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]  # the answer that the model is asked for
            if not messages:
                raise BadRecord("no message to answer; a prompt needs a user message")
            return Example(self.template.prompt(messages, tools), [], False, False)
        text, spans = self.template.conversation(messages, tools)
        return Example(text, spans, False, False)

    def alpaca(self, record):
        if self.options.long == "split":
            raise PrepError(
                errors.CONFIG_PAIR, "--long", "split is for text only; a piece of an answer is none"
            )
        given = record.get("input") or ""
        prompt = ALPACA_HEAD + (ALPACA_INPUT if given else "") + ALPACA_TAIL
        prompt += f"### Instruction:\n{record['instruction']}\n\n"
        prompt += f"### Input:\n{given}\n\n" if given else ""
        prompt += "### Response:"
        if self.options.prompts:
            return Example(prompt, [], True, False)
        text = prompt + record["output"]
        return Example(text, [(len(prompt), len(text))], True, True)

    def text(self, record):
        text = record["text"]
        if self.options.prompts:
            return Example(text, [], True, False)
        return Example(text, [(0, len(text))], True, True)

    def template_sha256(self):
        """The template's hash if it shaped the data, else empty."""
        used = self.source is not None and "messages" in self.forms
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest() if used else ""


def read_documents(options, tokenizer, builder, counts):
    """All documents of the input, shortened as asked, and a Counter of what was done to them."""
    done, documents, batch = Counter(), [], []

    def flush():
        encoded, straddling = tokenizer.encode(batch)
        done["straddling"] += straddling
        for document in encoded:
            documents.extend(fit(document, options, done))
        batch.clear()

    for example in read_records(
        options.data, options.format, options.on_bad_record == "skip", counts, builder
    ):
        done["without an assistant turn"] += not (example.spans or options.prompts)
        batch.append(example)
        if len(batch) == BATCH:
            flush()
    flush()
    return documents, done


def fit(document, options, done):
    """The document as none, one or several that fit into seq_len and, but for prompts, teach something."""
    length, limit = len(document.tokens), options.seq_len
    if length > limit and (options.prompts or options.long == "drop"):
        done["dropped, too long"] += 1
        return
    step = limit if options.long == "split" else max(length, 1)
    done["split" if options.long == "split" else "truncated"] += length > limit
    for begin in range(0, max(length, 1), step):
        piece = Document(
            document.tokens[begin : begin + limit], document.learned[begin : begin + limit]
        )
        if not options.prompts and not piece.learned[1:].any():
            done["dropped, nothing to learn"] += 1
        elif len(piece.tokens) == 0:
            done["dropped, empty"] += 1
        else:
            yield piece


def check_usable(options, documents, counts, done):
    """Training on nothing is refused, with the reason."""
    if documents:
        return
    where = ", ".join(options.data)
    if not counts.records:
        raise PrepError(
            errors.INPUT_VALUE,
            where,
            f"no usable record in {counts.lines} lines ({counts.empty} empty, "
            f"{counts.bad} bad)",
        )
    if options.prompts:
        reason = f"every prompt is empty or longer than --seq-len={options.seq_len}; raise it"
    elif done["without an assistant turn"] == counts.records:
        reason = "no record has an assistant message"
    elif done["truncated"] or done["dropped, too long"]:
        reason = f"what is to be learned lies behind --seq-len={options.seq_len}; raise it"
    else:
        reason = "the answers are empty"
    raise PrepError(
        errors.INPUT_VALUE,
        where,
        f"nothing is left of {counts.records} records: {reason}",
    )


def split_off(documents, fraction, seed):
    """(kept, held out), each in the order of the input. Chosen by hash, so the choice does not depend on a library."""
    if not fraction:
        return documents, []
    count = max(1, round(len(documents) * fraction))
    if count >= len(documents):
        raise PrepError(
            errors.INPUT_VALUE, "--eval-fraction", f"leaves nothing of {len(documents)} documents"
        )
    order = sorted(
        range(len(documents)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest()
    )
    held = set(order[:count])
    return (
        [d for i, d in enumerate(documents) if i not in held],
        [d for i, d in enumerate(documents) if i in held],
    )


def report(path, arrays, options):
    sequences, tokens = len(arrays["seq_targets"]), len(arrays["tokens"])
    longest = int((arrays["seq_offsets"][1:] - arrays["seq_offsets"][:-1]).max())
    print(
        f"{path}: {sequences} sequences of up to {longest} tokens, {len(arrays['doc_offsets']) - 1} documents, "
        f"{tokens} tokens, {int(arrays['seq_targets'].sum())} of them learned"
        + (f", {tokens / (sequences * options.seq_len):.0%} full" if options.pack else "")
    )


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
    limit = read_json(os.path.join(options.model, "config.json")).get("max_position_embeddings")
    if isinstance(limit, int) and options.seq_len > limit:
        raise PrepError(
            errors.USAGE,
            "--seq-len",
            f"is {options.seq_len}, but the model knows {limit} positions",
        )
    tokenizer = Tokenizer(options.model)
    builder = Builder(options, tokenizer)
    counts = Counts()
    documents, done = read_documents(options, tokenizer, builder, counts)
    check_usable(options, documents, counts, done)
    kept, held = split_off(documents, options.eval_fraction, options.seed)

    table = tokenizer.decode_table()
    arrays = arrange(kept, options.seq_len, options.pack)
    parts = [(options.output, arrays)] if options.output else []
    if held:
        parts.append((options.eval_out, arrange(held, options.seq_len, options.pack)))
    write_outputs(
        options,
        parts,
        table,
        {
            "vocab_size": tokenizer.vocab_size,
            "seq_len": options.seq_len,
            "packed": int(options.pack),
            "tokenizer_sha256": tokenizer.sha256,
            "template_sha256": builder.template_sha256(),
            "source": ", ".join(os.path.basename(path) for path in options.data),
        },
    )
    notes = [f"{n} {what}" for what, n in done.items() if n]
    print(
        f"{counts.records} records of {counts.lines} lines ({counts.empty} empty, {counts.bad} bad skipped)"
        + (": " + ", ".join(notes) if notes else "")
    )
    show(arrays, table, options.preview)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
