"""Rows for adapters, run directories and checkpoints."""
import numpy as np

from hostile import changes as to
from hostile.case import BASE, DATA, DEEP, HTML, INF_F32, NAN_F32, YAML, case, missing, not_a_file
from hostile.changes import GONE

# ---- PEFT adapter: eval, lora.init, merge, inspect, check ----

SETTINGS, LORA = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
B_OF = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
case("eval adapter", "adapter is missing", to.gone("adapter"), 300, missing("--adapter", "adapter"), 2)
case("eval adapter", "adapter is an empty directory", to.directory("adapter"), 301, "adapter: neither a checkpoint", 2)
case("eval adapter", "adapter is a file", to.put("adapter", b"x"), 301, "adapter: neither a checkpoint")


def without_linear(name, *layers):
    """The adapter without the tensors of a linear of these layers."""
    def alter(held):
        for tensor in [t for t in held if any(f".layers.{layer}." in t for layer in layers) and f".{name}." in t]:
            held.pop(tensor)
    return to.tensors(LORA, alter)


not_a_file("init", SETTINGS, says="adapter")
not_a_file("eval adapter", LORA, says="adapter")
for key, value, code in (("r", 0, 302), ("r", 2**40, 302), ("r", "8", 302), ("r", GONE, 302), ("lora_alpha", 0, 302),
                         ("lora_alpha", -1, 302), ("lora_alpha", "16", 302), ("lora_dropout", 2, 302),
                         ("use_rslora", 1, 302), ("peft_type", "LOHA", 303), ("peft_type", GONE, 302), ("bias", "all", 303),
                         ("use_dora", 1, 302), ("modules_to_save", ["lm_head"], 303),
                         ("rank_pattern", {"q_proj": 4}, 303), ("fan_in_fan_out", True, 303),
                         ("layers_to_transform", [1], 303), ("init_lora_weights", "pissa", 303)):
    case("eval adapter", f"adapter {key} = {'gone' if value is GONE else value}", to.field(SETTINGS, key, value), code,
         f"{SETTINGS}: .*{key}",
         2 if value in (2**40, "LOHA") else None)
for command, ranks in (("eval adapter", 2), ("init", 2), ("merge adapter", None), ("check adapter", None),
                       ("inspect adapter", None)):
    case(command, "adapter_config.json is cut off", to.cut(SETTINGS, 0.5), 301, f"{SETTINGS}: not valid JSON", ranks)
    case(command, "adapter_config.json has NaN", to.raw_field(SETTINGS, "lora_alpha", "NaN"), 301,
         f"{SETTINGS}: not valid JSON")
    case(command, "adapter_config.json has a key twice", to.twice(SETTINGS, "r"), 301, f"{SETTINGS}: .*duplicate")
    case(command, "adapter_model.safetensors is a pipe", to.fifo(LORA), 301, f"{LORA}: .*not a plain file", ranks)
    case(command, "adapter_model.safetensors is cut off", to.cut(LORA, 0.8), 301, LORA, ranks)
for command, ranks in (("eval adapter", 2), ("merge adapter", None)):
    case(command, "adapter r is not the tensors'", to.field(SETTINGS, "r", 8), 305, "adapter: .*lora_A", ranks)
for command in ("check adapter", "inspect adapter"):
    case(command, "adapter r is 2^40", to.field(SETTINGS, "r", 2**40), 302, f"{SETTINGS}: .*r.*outside")
case("init", "adapter of another rank", to.field(SETTINGS, "r", 8), 302, "adapter: .*lora.rank", 2)
case("init", "adapter of another scale", to.field(SETTINGS, "lora_alpha", 17), 302, "adapter: .*lora_alpha")
case("init", "adapter of fewer linears", without_linear("up_proj", 0, 1), 302, "adapter: .*no mlp.up_proj.*lora.targets")
for command, ranks in (("eval adapter", 2), ("init", 2), ("merge adapter", None)):
    case(command, "adapter lacks a tensor", to.without_tensor(LORA, B_OF), 305, f"adapter: .*{B_OF}", ranks)
    case(command, "adapter has a tensor too many", to.more_tensor(LORA, "base_model.model.lm_head.lora_A.weight"), 305,
         "adapter: .*lm_head.lora_A.weight.*belongs to no linear", ranks)
    case(command, "adapter whose layers differ", without_linear("up_proj", 1), 305,
         "adapter: .*layer 1 has no adapter of mlp.up_proj, layer 0 has one", ranks)
    case(command, "adapter has a transposed tensor", to.changed_tensor(LORA, B_OF, shape=(16, 96)), 305,
         f"adapter: .*{B_OF}")
    case(command, "adapter has a tensor of I32", to.changed_tensor(LORA, B_OF, dtype="I32"), 303, f"adapter: .*{B_OF}")
ORIGIN = "adapter/qshard.json"
for command, ranks in (("eval adapter", 2), ("init", None), ("merge adapter", None), ("check adapter", None), ("inspect adapter", None)):
    for what, change, code, says in (("is a directory", to.directory(ORIGIN), 301, "plain file"),
                                     ("is a pipe", to.fifo(ORIGIN), 301, "plain file"),
                                     ("is cut off", to.cut(ORIGIN, 0.5), 301, "not valid JSON"),
                                     ("is nested 100000 deep", to.put(ORIGIN, DEEP), 302, "bytes"),
                                     ("is a list", to.put(ORIGIN, b"[]"), 302, "base_sha256"),
                                     ("has a key twice", to.twice(ORIGIN, "base_sha256"), 301, "duplicate"),
                                     ("names a number", to.field(ORIGIN, "base_sha256", 7), 302, "base_sha256"),
                                     ("names no hash", to.field(ORIGIN, "base_sha256", "\x1b[2J" * 16), 302, "base_sha256")):
        case(command, f"qshard.json {what}", change, code, f"{ORIGIN}: .*{says}", ranks)
for command, ranks in (("eval adapter", 2), ("init", 2), ("merge adapter", None)):
    case(command, "adapter of another base", to.field(ORIGIN, "base_sha256", "0" * 64), 304, "adapter: was trained on a base with hash 0+",
         ranks)
TEMPLATE = "adapter/chat_template.jinja"
for what, change, code, says in (("is a directory", to.directory(TEMPLATE), 301, "plain file"),
                                 ("is a pipe", to.fifo(TEMPLATE), 301, "plain file"),
                                 ("is a device", to.endless(TEMPLATE), 301, "plain file"),
                                 ("is of 257 KiB", to.put(TEMPLATE, b"x" * (257 << 10)), 302, "bytes"),
                                 ("is not UTF-8", to.put(TEMPLATE, b"{{ m }}\xff"), 301, "UTF-8"),
                                 ("holds a NUL", to.put(TEMPLATE, b"{{ m }}\0"), 301, "UTF-8")):
    case("merge adapter", f"chat template {what}", change, code, f"{TEMPLATE}: .*{says}")
TOKENIZER = "model/tokenizer_config.json"
for what, change, says in (("is cut off", to.cut(TOKENIZER, 0.5), "not valid JSON"),
                           ("is a list", to.put(TOKENIZER, b"[]"), "object"),
                           ("is nested 100000 deep", to.put(TOKENIZER, DEEP), "deeper than 64"),
                           ("is a pipe", to.fifo(TOKENIZER), "plain file"),
                           ("has a key twice", to.twice(TOKENIZER, "chat_template"), "duplicate")):
    case("merge original", f"tokenizer_config.json {what}", to.both(to.put(TEMPLATE, "other"), change), 301,
         f"{TOKENIZER}: .*{says}")
for command, ranks in (("eval adapter", 2), ("init", 2), ("merge adapter", None), ("check adapter", None)):
    for bits, word in ((NAN_F32, "NaN"), (INF_F32, "infinity")):
        case(command, f"adapter {word}", to.number_in(LORA, B_OF, bits, 5), 302, f"adapter: .*{B_OF}.*element 5.*not finite",
             ranks if word == "NaN" else None)

# ---- DoRA: magnitudes and the flag that they belong to ----

DORA, DORA_SETTINGS = "dora/adapter_model.safetensors", "dora/adapter_config.json"
M_OF = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
for command, ranks in (("eval dora", 2), ("init dora", 2), ("merge dora", None), ("check dora", None)):
    if command != "check dora":  # which has no model to say how many there must be
        case(command, "adapter lacks a magnitude vector", to.without_tensor(DORA, M_OF), 305, f"dora: .*{M_OF}.*missing", ranks)
        case(command, "adapter has a magnitude vector of two dimensions", to.changed_tensor(DORA, M_OF, shape=(96, 1)), 305,
             f"dora: .*{M_OF}.*expected .96.", ranks)
        case(command, "adapter has a short magnitude vector", to.changed_tensor(DORA, M_OF, shape=(95,), content=bytes(380)), 305,
             f"dora: .*{M_OF}.*95.*expected .96.")
        case(command, "adapter has magnitudes of I32", to.changed_tensor(DORA, M_OF, dtype="I32"), 303, f"dora: .*{M_OF}")
        case(command, "adapter has use_dora and no magnitudes", to.tensors(DORA, lambda held: [
            held.pop(name) for name in list(held) if "magnitude" in name]), 305, "dora: .*lora_magnitude_vector.*missing", ranks)
    for bits, word in ((NAN_F32, "NaN"), (INF_F32, "infinity")):
        case(command, f"magnitude is {word}", to.number_in(DORA, M_OF, bits, 5), 302, f"dora: .*{M_OF}.*element 5.*not finite",
             ranks if word == "NaN" else None)
for command, ranks in (("eval dora", 2), ("merge dora", None)):
    case(command, "adapter has magnitudes without use_dora", to.field(DORA_SETTINGS, "use_dora", False), 305,
         "dora: .*holds", ranks)
case("init dora", "adapter has magnitudes without use_dora", to.field(DORA_SETTINGS, "use_dora", False), 302,
     "dora: use_dora=false, but lora.dora is true", 2)
case("init dora", "adapter has no use_dora", to.field(DORA_SETTINGS, "use_dora", GONE), 302,
     "dora: use_dora=false, but lora.dora is true")
case("inspect dora", "use_dora is a text", to.field(DORA_SETTINGS, "use_dora", "true"), 302, f"{DORA_SETTINGS}: .*use_dora")

# ---- runs and checkpoints: resume, eval, export, merge, inspect, check ----

STEP = "run/step-00000002"
MANIFEST, RANK0, RANK1 = f"{STEP}/manifest.json", f"{STEP}/rank-00000.h5", f"{STEP}/rank-00001.h5"
RUN = "run/run.json"
for what, change, code, says in (("is cut off", to.cut(RUN, 0.5), 301, "JSON"), ("is empty", to.empty(RUN), 301, "JSON"),
                                 ("is a directory", to.directory(RUN), 301, "plain file"),
                                 ("is a pipe", to.fifo(RUN), 301, "plain file"),
                                 ("is a list", to.put(RUN, b"[]"), 301, "object"),
                                 ("is another's", to.field(RUN, "format", "npm"), 204, "npm"),
                                 ("is of version 9", to.field(RUN, "format_version", 9), 303, "format_version"),
                                 ("has an id of 5000 letters", to.field(RUN, "run_id", "x" * 5000), 302, "run_id"),
                                 ("has no id", to.field(RUN, "run_id", GONE), 302, "run_id"),
                                 ("has finished = 7", to.field(RUN, "finished", 7), 302, "finished"),
                                 ("is nested 100000 deep", to.put(RUN, DEEP), 301, "deeper than 64")):
    case("resume", f"run.json {what}", change, code, f"{RUN}: .*{says}", 2 if code != 302 else None)
for command in ("inspect run", "check run"):
    case(command, "run.json is cut off", to.cut(RUN, 0.5), 301, f"{RUN}: .*JSON")
    case(command, "run.json is a pipe", to.fifo(RUN), 301, f"{RUN}: .*plain file")
    case(command, "run.json is another's", to.field(RUN, "format", "npm"), 301, f"{RUN}: .*npm")
OLD = "run/config.yaml"
case("resume", "config.yaml is a pipe", to.fifo(OLD), 301, f"{OLD}: is not a plain file", 2)
case("resume", "config.yaml is no YAML", to.put(OLD, HTML), 202, f"{OLD}:1: ", 2)
case("resume", "config.yaml is of another run", to.swap(OLD, b"seed: 42", b"seed: 41"), 802, "run: .*seed", 2)


def checkpoint(what, change, code, says, commands=("export step", "check step"), ranks=None):
    for command in commands:
        case(command, f"checkpoint {what}", change, code, says, ranks if command == "eval checkpoint" else None)


ALL = ("export step", "check step", "eval checkpoint", "merge step")
checkpoint("manifest is cut off", to.cut(MANIFEST, 0.9), 301, MANIFEST, ALL, 2)
checkpoint("manifest is empty", to.empty(MANIFEST), 301, MANIFEST, ALL)
checkpoint("manifest is a pipe", to.fifo(MANIFEST), 301, f"{MANIFEST}: .*plain file", ALL, 2)
checkpoint("manifest is a directory", to.directory(MANIFEST), 301, f"{MANIFEST}: .*plain file", ALL)
checkpoint("manifest is a link to itself", to.link_loop(MANIFEST), 300, "run/step-00000002")
checkpoint("manifest is edited", to.swap(MANIFEST, b'"step": 2', b'"step": 3'), 304, f"{MANIFEST}: .*self_sha256", ALL, 2)
for key, value, code in (("format", "qshard-manifold", 301), ("format_version", 2, 303), ("step", -1, 302),
                         ("step", "2", 301), ("nranks", 0, 302), ("nranks", 2**40, 302), ("run_id", "x" * 500, 302),
                         ("files", [], 301), ("files", {}, 301), ("files/0/name", "../../../etc/passwd", 302),
                         ("files/0/name", "/etc/passwd", 302), ("files/0/name", "a\nb", 302), ("files/0/size", -1, 302),
                         ("files/0/size", 2**62, 302), ("files/0/size", 2**40, 302), ("files/0/sha256", "0", 302),
                         ("files/0/xxh3", [], 302), ("files/0/xxh3", ["x"], 302)):
    checkpoint(f"manifest {key} = {value}", to.manifest_field(key, value, MANIFEST), code,
               f"{MANIFEST}: .*{'xxh3' if value == 2**40 and 'size' in key else key.split('/')[-1]}")
checkpoint("manifest names a file twice", to.manifest_swap(MANIFEST, "rank-00001", "rank-00000"), 302,
           f"{MANIFEST}: .*twice")
checkpoint("manifest has a key twice", to.manifest_swap(MANIFEST, '"step": 2', '"step": 2,\n "step": 2'), 301,
           f"{MANIFEST}: .*duplicate")
checkpoint("manifest is nested 3000 deep", to.manifest_swap(MANIFEST, '"step": 2',
                                                            '"x": ' + "[" * 3000 + "]" * 3000 + ',\n "step": 2'), 301,
           f"{MANIFEST}: .*depth")
for key, value in (("config", 7), ("config", "base: [\n"), ("lora", GONE), ("lora/layers", 0), ("lora/layers", 2**40),
                   ("lora/layers", 1), ("lora/shapes", {}), ("lora/shapes/q_proj", [64, 2**40]),
                   ("lora/shapes/q_proj", [64, 63]), ("base_sha256", "x" * 500), ("tokens_seen", -1),
                   ("chat_template", 7), ("chat_template", None), ("chat_template", "x" * (300 << 10))):
    says = "lora" if key == "lora/layers" and value == 1 or value == [64, 63] else key.split("/")[-1]
    case("export step", f"checkpoint record {key} = {'gone' if value is GONE else str(value)[:30]}",
         to.manifest_field(key, value, MANIFEST),
         202 if value == "base: [\n" else 301 if value == 1 else 302,
         f"{STEP}.*({says}|{'YAML' if key == 'config' else says})")
checkpoint("file is missing", to.gone(RANK1), 300, RANK1, ALL, 2)
checkpoint("file is empty", to.empty(RANK1), 304, RANK1, ALL)
checkpoint("file is cut off", to.cut(RANK1, -1), 304, RANK1, ALL, 2)
checkpoint("file is damaged", to.flip(RANK1, 20000), 304, RANK1, ALL, 2)
checkpoint("file is a pipe", to.fifo(RANK1), 301, f"{RANK1}: .*plain file", ALL, 2)
checkpoint("file is a directory", to.directory(RANK1), 301, f"{RANK1}: .*plain file", ALL)
checkpoint("files are exchanged", to.both(to.renamed(RANK0, STEP + "/x"), to.renamed(RANK1, RANK0),
                                          to.renamed(STEP + "/x", RANK1)), 304, STEP, ALL)


STARTED = r"run/(config\.yaml|run\.json)"  # a start is counted


def signed_shard(what, change, code, says, commands=("export step", "resume")):
    for command in commands:
        case(command, f"checkpoint {what}, hashed anew", to.signed_files(STEP, change), code, f"{RANK1}: .*{says}",
             *((2, STARTED) if command == "resume" else ()))


signed_shard("of another rank", to.attribute(RANK1, "rank", 0), 302, "rank")
signed_shard("of another step", to.attribute(RANK1, "step", 4), 302, "step")
signed_shard("of another format", to.attribute(RANK1, "format", "x"), 301, "format")
signed_shard("of version 2", to.attribute(RANK1, "format_version", 2), 303, "format_version")
signed_shard("without lora", to.dataset(RANK1, "lora", GONE), 301, "lora")
signed_shard("with a short lora", to.dataset(RANK1, "lora", lambda data: data[:-1]), 301, "lora")
signed_shard("with a lora of doubles", to.dataset(RANK1, "lora", lambda data: data.astype("f8")), 301, "lora")
signed_shard("that is HTML", to.put(RANK1, HTML), 301, "")
signed_shard("with NaN in lora", to.values(RANK1, "lora", 5, np.nan), 302, "lora.*not finite")
signed_shard("without m", to.dataset(RANK1, "m", GONE), 301, "\"m\"", ("resume",))
signed_shard("with NaN in m", to.values(RANK1, "m", 5, np.nan), 302, "m.*not finite", ("resume",))
signed_shard("with infinity in v", to.values(RANK1, "v", 5, np.inf), 302, "v.*not finite", ("resume",))
case("inspect step", "manifest is cut off", to.cut(MANIFEST, 0.9), 301, MANIFEST)
case("inspect step", "manifest is edited", to.swap(MANIFEST, b'"step": 2', b'"step": 3'), 304, f"{MANIFEST}: .*self_sha256")
case("inspect step", "record has no lora", to.manifest_field("lora", GONE, MANIFEST), 302, f"{STEP}.*lora")
case("inspect config", "a text for a number", to.swap(YAML, b"seed: 42", b"seed: many"), 202, f"{YAML}:\\d+: .*seed")
for what, change in (("is missing", to.gone(STEP)), ("manifest is cut off", to.cut(MANIFEST, 0.5)),
                     ("manifest is a pipe", to.fifo(MANIFEST))):
    case("resume", f"checkpoint {what}", change, 403, "run: no checkpoint that verifies", 2)
    for command in ("export", "merge run"):
        case(command, f"checkpoint {what}", change, 403,
             "run: the run has no" if "missing" in what else "run: no checkpoint of the run verifies")
case("export", "manifest forges an error line", to.manifest_field("files/0/name", "a\nerror[E999] x", MANIFEST), 403,
     "run: no checkpoint")
SET_ASIDE = r"run/(config\.yaml|run\.json|step-00000002(\.bad)?(/.*)?)"  # a start is counted, a bad checkpoint renamed
for what, change in (("file is damaged", to.flip(RANK1, 20000)), ("file is missing", to.gone(RANK0)),
                     ("file is cut off", to.cut(RANK1, 0.5))):
    case("resume", f"checkpoint {what}", change, 403, "run: no checkpoint that verifies", 2, SET_ASIDE)
LOCK = "run/run.lock"
for what, change in (("is garbage", to.put(LOCK, HTML)), ("is empty", to.empty(LOCK)), ("is a pipe", to.fifo(LOCK)),
                     ("is a directory", to.directory(LOCK)), ("is a link to nothing", to.link(LOCK, "nowhere")),
                     ("is of another host", to.put(LOCK, b'{"host": "x", "job": "", "pid": 1, "born": 1, "restart": 0}'))):
    case("resume", f"run.lock {what}", change, 204, "run: .*--takeover", 2)
METRICS = "run/metrics.jsonl"
for what, change, code in (("is a pipe", to.fifo(METRICS), 301), ("is a directory", to.directory(METRICS), 301),
                           ("is a link to nothing", to.link(METRICS, "nowhere"), 300)):
    case("resume", f"metrics.jsonl {what}", change, code, METRICS, 2, STARTED)
OTHER_BASE = to.signed_base(to.values(BASE, "units/layers.0/packed", (0, 0), 1))
case("resume", "run is missing", to.gone("run"), 403, "run", 2)
case("resume", "configuration has another seed", to.swap(YAML, b"seed: 42", b"seed: 43"), 802, "run.*seed", 2)
case("resume", "base of another model", OTHER_BASE, 802, "run.*base", 2, STARTED)


def other_target(file):
    labels = file["labels"]
    at = int(np.argmax(labels[()] >= 2))
    labels[at] = labels[at] ^ 1


case("resume", "data with another target", to.signed_data(to.h5(DATA, other_target)), 802, "run.*data.train: its labels", 2,
     STARTED)
case("export", "a run without checkpoints", to.gone(STEP), 403, "run")
case("export", "a PEFT directory", to.both(to.gone("run"), to.directory("run"), to.put("run/adapter_config.json", b"{}")),
     301, "run: is a PEFT directory already")
case("export", "a directory of nothing", to.both(to.gone("run"), to.directory("run")), 301, "run: neither a checkpoint")
case("export", "a file", to.both(to.gone("run"), to.put("run", HTML)), 301, "run")
case("export", "a pipe", to.fifo("run"), 301, "run")
case("export", "output is there", to.directory("out"), 204, "out")
case("merge run", "output is there", to.directory("out"), 204, "out")
case("export", "output is a link to nothing", to.link("out", "nowhere"), 204, "out")
case("merge run", "output is a link to nothing", to.link("out", "nowhere"), 204, "out")
case("train", "output is a link to nothing", to.link("out", "nowhere"), 204, "out", 2)
case("quantize", "output is there", to.put("out.h5", b"mine"), 204, "out.h5", 2)
case("quantize", "output is a link to nothing", to.link("out.h5", "nowhere"), 204, "out.h5")
case("merge run", "base of another model", OTHER_BASE, 304, f"{STEP}: was trained on a base with hash")
case("merge run", "base is missing", to.gone(BASE), 300, missing("base", BASE))
case("merge adapter", "base is missing", to.gone(BASE), 300, missing("--base", BASE))
for kind, name in (("shard", RANK0), ("data", DATA), ("base", BASE)):
    case(f"inspect {kind}", "no format", to.attribute(name, "format", GONE), 301, name)
    case(f"inspect {kind}", "an unknown format", to.attribute(name, "format", "qshard-x"), 301, f"{name}: .*qshard-x")
    case(f"inspect {kind}", "is missing", to.gone(name), 300, name)
case("inspect shard", "no lora", to.dataset(RANK0, "lora", GONE), 301, f"{RANK0}: .*lora")
