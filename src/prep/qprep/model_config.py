"""config.json of a model; of one of text and images that of its text part, as src/hf/hf_text_part.c takes it."""

import os
import stat

from . import errors
from .errors import PrepError
from .files import read_json

# What text_config leaves out on the Hub: the defaults of Gemma3TextConfig and MistralConfig.
WRAPPERS = {
    "gemma3": {"vocab_size": 262208, "max_position_embeddings": 131072},
    "mistral3": {"vocab_size": 32000, "max_position_embeddings": 131072},
}


def check_model_folder(model_dir):
    """The name of a model on a hub, or a file of it, is what is given by mistake. The words are those of qshard quantize."""
    try:
        mode = os.stat(model_dir).st_mode
    except OSError as error:
        raise PrepError(
            errors.INPUT_MISSING,
            model_dir,
            f"{error.strerror}; nothing is downloaded: name a folder with config.json and tokenizer.json, as "
            "hf download ORG/MODEL --local-dir FOLDER makes it",
        ) from error
    if not stat.S_ISDIR(mode):
        raise PrepError(errors.INPUT_FORMAT, model_dir, "is a file; name the folder with config.json and tokenizer.json")
    if not os.path.lexists(os.path.join(model_dir, "config.json")):
        raise PrepError(
            errors.INPUT_MISSING,
            model_dir,
            "holds no config.json; name the folder with config.json and tokenizer.json, in a cache of the Hub snapshots/...",
        )


def read_model_config(model_dir):
    config = read_json(os.path.join(model_dir, "config.json"))
    kind, text = config.get("model_type"), config.get("text_config")
    if kind not in list(WRAPPERS) or not isinstance(text, dict):  # a list, since kind may be anything
        return config
    given = {key: value for key, value in text.items() if value is not None}
    outer = {key: config[key] for key in ("eos_token_id",) if config.get(key) is not None}
    return {**WRAPPERS[kind], **given, **outer}
