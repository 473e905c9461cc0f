"""The data sets of Answer.AI's fsdp_qlora, as its train.py made them: same text, same mask, same choice of samples.

Each mode names a data set there; here its records come from a file. All have in common: prompt and whole text are
tokenized separately, the end-of-text token is appended and learned, and the first tokens of the whole text, as many as the
prompt has, are not learned. docs/data.md tells where that has quirks.
"""

import numpy as np

from . import errors
from .errors import PrepError
from .records import text_field

FORMATS = (
    "fsdp_qlora:alpaca",
    "fsdp_qlora:alpaca_sample",
    "fsdp_qlora:guanaco",
    "fsdp_qlora:sql",
    "fsdp_qlora:orca_math",
    "fsdp_qlora:dummy",
)
DUMMY = "fsdp_qlora:dummy"
READ = {  # the keys of a record
    **dict.fromkeys(FORMATS, frozenset(("instruction", "input", "output"))),
    "fsdp_qlora:guanaco": frozenset(("text",)),
    "fsdp_qlora:sql": frozenset(("context", "question", "answer")),
    "fsdp_qlora:orca_math": frozenset(("question", "answer")),
}
CHOOSING = ("fsdp_qlora:alpaca_sample", "fsdp_qlora:sql", "fsdp_qlora:orca_math")  # take a part of their rows
SAMPLES = 512  # train.py's dataset_samples
SQL_HELD_OUT = 1000
ORCA_SEED = 42
GUANACO_MARK = "### Assistant: "

# The two prompts of Stanford Alpaca.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_CONTEXT = "###Context:\n{context}\n###Question:\n{question}\n###Answer:\n"
WITHOUT_CONTEXT = "###Question:\n{question}\n###Answer:\n"


def build(form, record):
    """(prompt, whole text) of a record."""
    mode = form.partition(":")[2]
    if mode == "guanaco":
        text = text_field(record, "text")
        return text.split(GUANACO_MARK)[0], text
    if mode == "sql":
        prompt = WITH_CONTEXT.format(
            context=text_field(record, "context"), question=text_field(record, "question")
        )
        return prompt, prompt + text_field(record, "answer")
    if mode == "orca_math":
        prompt = WITHOUT_CONTEXT.format(question=text_field(record, "question"))
        return prompt, prompt + text_field(record, "answer")
    instruction, given = text_field(record, "instruction"), text_field(record, "input", default="")
    wording = WITH_INPUT if given else WITHOUT_INPUT
    prompt = wording.format(instruction=instruction, input=given)
    return prompt, prompt + text_field(record, "output")


def dummy_records(seq_len, samples):
    """The data set without data: rows that fill every sequence."""
    record = {"instruction": "instruction", "input": "input", "output": "output" * seq_len * 2}
    return [record] * (SAMPLES if samples is None else samples)


def chosen(form, rows, seed, samples, where):
    """The rows that the mode trains on, in its order; `rows` is a list of what stands for the data set's rows."""
    count = SAMPLES if samples is None else samples
    if form == "fsdp_qlora:alpaca_sample":
        return rows[:count]
    if form == "fsdp_qlora:sql":
        if len(rows) <= SQL_HELD_OUT:
            raise PrepError(
                errors.INPUT_VALUE,
                where,
                f"has {len(rows)} records, but {form} leaves the first {SQL_HELD_OUT} of the shuffled ones out; "
                'give the whole validation split, or --format completion with "prompt" and "completion"',
            )
        return [rows[i] for i in shuffled(len(rows), seed)[SQL_HELD_OUT:]]
    return [rows[i] for i in shuffled(len(rows), ORCA_SEED)[:count]]


def shuffled(count, seed):
    """The order of Hugging Face datasets' Dataset.shuffle(seed)."""
    return np.random.default_rng(seed).permutation(count).tolist()


def need_no_data(options):
    """The mode dummy takes no file, every other format at least one."""
    if options.format == DUMMY and options.data:
        raise PrepError(errors.USAGE, "--format", f"{DUMMY} makes its own data; name no file")
    if options.format != DUMMY and not options.data:
        raise PrepError(errors.USAGE, "qshard-prep", "name a data file; see qshard-prep --help")
