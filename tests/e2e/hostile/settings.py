"""Rows for YAML configurations."""
from hostile import changes as to
from hostile.case import DATA, HTML, YAML, case

for command, ranks in (("train", 2), ("check config", None)):
    case(command, "configuration is missing", to.gone(YAML), 300, YAML, ranks)
    case(command, "configuration is empty", to.empty(YAML), 202, f"{YAML}.*empty", ranks)
    case(command, "configuration is a link to itself", to.link_loop(YAML), 300, YAML)
    case(command, "configuration is a pipe", to.fifo(YAML), 301, YAML, ranks)
    case(command, "configuration is a device", to.endless(YAML), 301, YAML)
    case(command, "configuration is of 2 MiB", to.longer(YAML, b"# " + b"x" * (2 << 20)), 202, f"{YAML}: .*bytes", ranks)
    case(command, "configuration is HTML", to.put(YAML, HTML), 202, YAML)
    case(command, "configuration has a NUL", to.longer(YAML, b"\0\n"), 202, f"{YAML}: .*NUL", ranks)
    case(command, "configuration is UTF-16", to.utf16(YAML), 202, f"{YAML}: .*(NUL|UTF-16)")
    case(command, "configuration is not UTF-8", to.longer(YAML, b"# \xff\xfe\n"), 202,
         f"{YAML}: .*UTF-8|{YAML}:\\d+: .*UTF-8")
    case(command, "configuration has tabs", to.longer(YAML, b"\tseed: 3\n"), 202, f"{YAML}:\\d+: ")
case("train", "configuration is a directory", to.directory(YAML), 301, YAML, 2)
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i,
                                                                      b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9))
case("train", "configuration is a bomb of aliases", to.longer(YAML, BOMB), 201, f"{YAML}:\\d+: unknown key|anchor", 2)
case("train", "configuration has a bomb in a value", to.swap(YAML, b"betas: [0.9, 0.999]", b"betas: &a [*a, *a]"), 202,
     f"{YAML}:\\d+: .*(anchor|alias)", 2)
case("train", "configuration is nested 10000 deep", to.longer(YAML, b"cpu: " + b"[" * 10000 + b"\n"), 202, f"{YAML}:\\d+: ",
     2)
case("train", "configuration has maps 10000 deep", to.longer(YAML, b"cpu: " + b"{a: " * 10000 + b"\n"), 201,
     f"{YAML}:\\d+: .*cpu.a")
for what, old, new, code, says in (("key twice", b"seed: 42", b"seed: 42\nseed: 43", 201, "seed.*twice"),
                                   ("section twice", b"seed: 42", b"lora: {rank: 8}\nseed: 42", 201, "lora.*twice"),
                                   ("unknown key", b"steps: 2", b"stepz: 2", 201,
                                    "train.stepz.*did you mean \"train.steps\""),
                                   ("tag", b"seed: 42", b"seed: !!int 42", 202, "tag"),
                                   ("binary tag", b"seed: 42", b"seed: !!python/object:os.system 42", 202, "tag"),
                                   ("text for a number", b"seed: 42", b"seed: many", 202, "seed"),
                                   ("two documents", b"seed: 42", b"seed: 42\n---\nseed: 43", 202, "document"),
                                   ("list for a value", b"seed: 42", b"seed: [42]", 202, "seed"),
                                   ("mapping for a value", b"seed: 42", b"seed: {a: 1}", 202, "seed"),
                                   ("negative seed", b"seed: 42", b"seed: -1", 202, "seed"),
                                   ("seed of 2^63", b"seed: 42", b"seed: 9223372036854775808", 202, "seed"),
                                   ("no steps", b"steps: 2", b"steps: 0", 203, "train.steps"),
                                   ("steps of 2^40", b"steps: 2", b"steps: 1099511627776", 202, "train.steps"),
                                   ("seq_len of 2^40", b"seq_len: 64", b"seq_len: 1099511627776", 202, "train.seq_len"),
                                   ("lr NaN", b"lr: 5.0e-3", b"lr: .nan", 202, "optim.lr"),
                                   ("lr infinity", b"lr: 5.0e-3", b"lr: .inf", 202, "optim.lr"),
                                   ("lr nan as a word", b"lr: 5.0e-3", b"lr: nan", 202, "optim.lr"),
                                   ("lr 1e999", b"lr: 5.0e-3", b"lr: 1e999", 202, "optim.lr"),
                                   ("lr 0", b"lr: 5.0e-3", b"lr: 0", 202, "optim.lr"),
                                   ("lr quoted", b"lr: 5.0e-3", b'lr: "5.0e-3"', 202, "optim.lr"),
                                   ("clip NaN", b"clip: 1.0", b"clip: .NaN", 202, "optim.clip"),
                                   ("rank 0", b"rank: 16", b"rank: 0", 202, "lora.rank"),
                                   ("rank 2^31", b"rank: 16", b"rank: 2147483648", 202, "lora.rank"),
                                   ("dropout 1", b"dropout: 0.05", b"dropout: 1.0", 202, "lora.dropout"),
                                   ("dropout -0.1", b"dropout: 0.05", b"dropout: -0.1", 202, "lora.dropout"),
                                   ("another target", b"targets: all-linear", b"targets: [lm_head]", 202, "lm_head"),
                                   ("betas of one", b"betas: [0.9, 0.999]", b"betas: [0.9]", 202, "optim.betas"),
                                   ("betas NaN", b"betas: [0.9, 0.999]", b"betas: [.nan, 0.9]", 202, "optim.betas"),
                                   ("micro above global", b"micro_batch: 2", b"micro_batch: 64", 203, "micro_batch"),
                                   ("device", b"seed: 42", b"device: tpu\nseed: 42", 202, "device"),
                                   ("base is the output", b"output: out", b"output: base.h5", 203, "output"),
                                   ("unclosed list", b"betas: [0.9, 0.999]", b"betas: [0.9", 202, "YAML|betas"),
                                   ("control character", b"seed: 42", b"seed: 42 # \x01", 202, "YAML"),
                                   ("path of 5000 letters", b"base: base.h5", b"base: " + b"x" * 5000, 202, "base"),
                                   ("base that is not UTF-8", b"base: base.h5", b"base: b\xffse.h5", 202, "UTF-8"),
                                   ("base of line breaks", b"base: base.h5", b'base: "no\\nsuch\\nfile"', 202,
                                    "base: .*control character")):
    case("train", f"configuration {what}", to.swap(YAML, old, new), code, f"{YAML}(:\\d+)?: .*({says})",
         2 if code == 203 or what in ("lr NaN", "key twice", "base of line breaks") else None)
case("train", "seq_len below the data's", to.swap(YAML, b"seq_len: 64", b"seq_len: 8"), 302, f"{DATA}|eval.h5", 2)
case("eval", "configuration without data.eval", to.swap(YAML, b"  eval: eval.h5\n", b""), 202, f"{YAML}: .*data.eval")
case("train", "output is a file", to.put("out", b"x"), 204, "out", 2)
case("train", "output is another's directory", to.both(to.directory("out"), to.put("out/thesis.tex", b"x")), 204,
     "out: .*thesis.tex", 2)
case("train", "output is a link to itself", to.link_loop("out"), 204, "out", 2)
