"""What the oracle is asked: small models, a real one, their data, adapters and settings. Plain data, no torch."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Settings:
    """How the adapter is trained: AdamW after a warm-up (a fraction of the steps if below 1)."""

    lr: float
    steps: int = 50
    schedule: str = "cosine"
    warmup: float = 0.03
    min_lr_ratio: float = 0.1
    clip: float = 1.0
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Case:
    """`model` are options of qshard_tiny.py, or None where the checkpoint is given.

    `sequences` are packed rows: each is a list of documents (length, ignored), whose first `ignored` labels are -100.
    The global batch is the whole set, so that every step sees all of it and the order of samples does not matter.
    """

    name: str
    model: list | None
    sequences: list
    eval_sequences: list
    seed: int
    lora_rank: int = 4
    lora_alpha: int = 8
    b_deviation: float = 0.05  # B is not zero, so that A has a gradient
    settings: Settings = Settings(lr=1e-3)
    micro_batch: int = 2
    dropout: float = 0.0
    dora: bool = False

    @property
    def seq_len(self):
        return max(sum(length for length, _ in row) for row in self.sequences + self.eval_sequences)


CASES = {
    case.name: case
    for case in [
        # Two layers of the usual kind: grouped queries, tied head, 7 rows of ragged length.
        Case(
            name="tiny2",
            model="--hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 160 --vocab 320 --seed 11".split(),
            sequences=[
                [(17, 5)],
                [(9, 0), (12, 4), (3, 0)],  # packed
                [(1, 0), (20, 20)],  # nothing to learn: a document of one token, and one that is all prompt
                [(31, 10)],
                [(2, 0)],
                [(8, 3), (1, 0), (14, 7)],  # a document of one token inside
                [(23, 1)],
            ],
            eval_sequences=[[(19, 6)], [(7, 0), (11, 5)], [(26, 9)]],
            seed=101,
        ),
        # Nothing fits: widths 72, 80 and 248 are no multiples of 64, so NF4 blocks cross rows; a head is 20 wide though
        # 72 / 4 is 18; 397 is prime; two quanta in the MLP; own head; rotary scaling with wavelengths on all sides of
        # its borders (8 and 32 positions).
        Case(
            name="odd",
            model=(
                "--hidden 72 --layers 2 --heads 4 --kv-heads 2 --head-dim 20 --ffn 248 --vocab 397 --untied "
                "--rope-scaling llama3 --seed 12"
            ).split(),
            sequences=[
                [(40, 11)],
                [(5, 5), (5, 0), (33, 2)],
                [(6, 6)],  # nothing to learn
                [(48, 1)],
                [(13, 0), (13, 13), (13, 3)],
                [(21, 8)],
                [(3, 1)],
                [(29, 0), (10, 4)],
                [(44, 20)],
            ],
            eval_sequences=[[(48, 7)], [(12, 0), (30, 3)]],
            seed=102,
            micro_batch=3,
        ),
        # Every linear has a bias; as many heads of keys as of queries.
        Case(
            name="biases",
            model=(
                "--hidden 64 --layers 2 --heads 4 --kv-heads 4 --ffn 160 --vocab 320 --attention-bias --mlp-bias "
                "--seed 13"
            ).split(),
            sequences=[[(24, 6)], [(11, 0), (9, 2)], [(4, 4)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(22, 4)], [(10, 0), (6, 2)]],
            seed=103,
            micro_batch=1,
        ),
        # A window of 7 positions on every layer, and heads wider than hidden / heads.
        Case(
            name="mistral",
            model=(
                "--arch mistral --window 7 --hidden 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 24 --ffn 160 "
                "--vocab 320 --untied --seed 14"
            ).split(),
            sequences=[[(33, 5)], [(9, 0), (18, 4), (3, 0)], [(7, 2)], [(8, 3), (1, 0), (26, 7)]],
            eval_sequences=[[(29, 6)], [(7, 0), (15, 5)]],
            seed=106,
        ),
        # Biases on q, k and v; the second layer sees 5 positions, the first all.
        Case(
            name="qwen2",
            model=(
                "--arch qwen2 --window 5 --window-layers 1 --hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 160 "
                "--vocab 320 --seed 15"
            ).split(),
            sequences=[[(25, 6)], [(11, 0), (9, 2)], [(4, 4)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(22, 4)], [(10, 0), (6, 2)]],
            seed=107,
        ),
        # A norm over each head of q and k, of a width of its own.
        Case(
            name="qwen3",
            model="--arch qwen3 --hidden 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 24 --ffn 160 --vocab 320 --seed 16".split(),
            sequences=[[(25, 6)], [(11, 0), (9, 2)], [(4, 4)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(22, 4)], [(10, 0), (6, 2)]],
            seed=108,
        ),
        # Gemma 3: four norms of 1 + w, GELU, a scaled embedding, norms of heads; the first layer sees 6 positions and
        # turns by a base of its own, the second sees all and scales its angles; scores by the root of 20, not of 24.
        Case(
            name="gemma3",
            model=(
                "--arch gemma3_text --window 6 --window-pattern 2 --rope-scaling linear --query-scalar 20 --hidden 64 "
                "--layers 2 --heads 4 --kv-heads 2 --head-dim 24 --ffn 160 --vocab 320 --seed 18"
            ).split(),
            sequences=[[(33, 5)], [(9, 0), (18, 4), (3, 0)], [(7, 7)], [(8, 3), (1, 0), (26, 7)]],
            eval_sequences=[[(29, 6)], [(7, 0), (15, 5)]],
            seed=110,
        ),
        # Gemma 2: scores and logits capped well inside of their range; each first of two layers sees 6 positions.
        Case(
            name="gemma2",
            model=(
                "--arch gemma2 --window 6 --attention-cap 2 --final-cap 3 --query-scalar 6 --hidden 64 "
                "--layers 2 --heads 4 --kv-heads 2 --head-dim 24 --ffn 160 --vocab 320 --seed 19"
            ).split(),
            sequences=[[(33, 5)], [(9, 0), (18, 4), (3, 0)], [(7, 7)], [(8, 3), (1, 0), (26, 7)]],
            eval_sequences=[[(29, 6)], [(7, 0), (15, 5)]],
            seed=111,
        ),
        # Rotary scaling with a magnitude, and frequencies that it keeps, divides and blends.
        Case(
            name="yarn",
            model=(
                "--arch qwen2 --rope-scaling yarn --hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 160 --vocab 320 --seed 17"
            ).split(),
            sequences=[[(60, 6)], [(11, 0), (9, 2)], [(4, 4)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(52, 4)], [(10, 0), (6, 2)]],
            seed=109,
        ),
        # Phi-3: q, k and v of one linear, gate and up of another, none of whose parts is a multiple of 64 rows wide; a
        # window of 7 positions on every layer, own head.
        Case(
            name="phi3",
            model=(
                "--arch phi3 --window 7 --hidden 72 --layers 2 --heads 4 --kv-heads 2 --ffn 164 --vocab 320 --untied "
                "--seed 20"
            ).split(),
            sequences=[[(33, 5)], [(9, 0), (18, 4), (3, 0)], [(7, 7)], [(8, 3), (1, 0), (26, 7)]],
            eval_sequences=[[(29, 6)], [(7, 0), (15, 5)]],
            seed=112,
        ),
        # Phi-4-mini's: three quarters of a head turn, by long factors, since every document is longer than 8 positions.
        Case(
            name="longrope",
            model=(
                "--arch phi3 --rope-scaling longrope --original-position 8 --partial-rotary 0.75 --max-position 64 "
                "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 160 --vocab 320 --seed 22"
            ).split(),
            sequences=[[(40, 6)], [(11, 0), (9, 2), (12, 3)], [(10, 10)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(38, 4)], [(10, 0), (9, 2)]],
            seed=113,
        ),
        # OLMo 2: norms behind attention and MLP alone, and over all heads of q and of k together, whose width (80) is not
        # hidden; no width is a multiple of 64; biases on q, k, v and o; own head.
        Case(
            name="olmo2",
            model=(
                "--arch olmo2 --hidden 72 --layers 2 --heads 4 --kv-heads 2 --head-dim 20 --ffn 164 --vocab 397 --untied "
                "--attention-bias --seed 25"
            ).split(),
            sequences=[[(33, 5)], [(9, 0), (18, 4), (3, 0)], [(7, 7)], [(8, 3), (1, 0), (26, 7)]],
            eval_sequences=[[(29, 6)], [(7, 0), (15, 5)]],
            seed=116,
        ),
        # OLMo 3: the same layers, tied; two of three see 6 positions and turn without scaling, the third sees all and turns
        # by yarn.
        Case(
            name="olmo3",
            model=(
                "--arch olmo3 --window 6 --window-pattern 3 --rope-scaling yarn --hidden 64 --layers 3 --heads 4 --kv-heads 2 "
                "--head-dim 24 --ffn 160 --vocab 320 --seed 26"
            ).split(),
            sequences=[[(60, 6)], [(11, 0), (9, 2)], [(4, 4)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(52, 4)], [(10, 0), (6, 2)]],
            seed=117,
        ),
        # The same factors on Llama's layers, by the short ones: no sequence is longer than 40 positions.
        Case(
            name="longrope_short",
            model=(
                "--rope-scaling longrope --original-position 40 --max-position 320 --hidden 64 --layers 2 --heads 4 "
                "--kv-heads 2 --ffn 160 --vocab 320 --seed 23"
            ).split(),
            sequences=[[(40, 6)], [(11, 0), (9, 2), (12, 3)], [(10, 10)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(38, 4)], [(10, 0), (9, 2)]],
            seed=114,
        ),
        # A base by length: all documents are as long, for transformers goes by the longest that it has seen so far.
        Case(
            name="dynamic",
            model=(
                "--rope-scaling dynamic --max-position 16 --hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 160 "
                "--vocab 320 --seed 24"
            ).split(),
            sequences=[[(40, 6)], [(40, 0)], [(40, 40)], [(40, 21)]],
            eval_sequences=[[(40, 4)], [(40, 12)]],
            seed=115,
        ),
        # SmolLM3: each second of three layers is without RoPE; odd widths, a head 20 wide though 72 / 4 is 18, tied head.
        Case(
            name="smollm3",
            model=(
                "--arch smollm3 --no-rope-interval 2 --hidden 72 --layers 3 --heads 4 --kv-heads 2 --head-dim 20 --ffn 164 "
                "--vocab 397 --seed 25"
            ).split(),
            sequences=[[(33, 5)], [(9, 0), (18, 4), (3, 0)], [(7, 7)], [(8, 3), (1, 0), (26, 7)]],
            eval_sequences=[[(29, 6)], [(7, 0), (15, 5)]],
            seed=116,
        ),
        # A list of layers without RoPE, of which the last entry is of no layer; these see 6 positions; biases on all seven
        # linears, yarn with its magnitude where layers turn, own head.
        Case(
            name="smollm3_window",
            model=(
                "--arch smollm3 --no-rope-layers 0101 --window 6 --rope-scaling yarn --attention-bias --mlp-bias --hidden 72 "
                "--layers 3 --heads 6 --kv-heads 2 --ffn 164 --vocab 320 --untied --seed 26"
            ).split(),
            sequences=[[(60, 6)], [(11, 0), (9, 2)], [(4, 4)], [(30, 8)], [(16, 5)]],
            eval_sequences=[[(52, 4)], [(10, 0), (6, 2)]],
            seed=117,
        ),
        # Granite: factors of embedding, scores, branches and logits, none of them a power of two; biases, tied head.
        Case(
            name="granite",
            model=(
                "--arch granite --embedding-multiplier 3 --attention-multiplier 0.17 --residual-multiplier 0.22 "
                "--logits-scaling 1.7 --attention-bias --mlp-bias --hidden 72 --layers 3 --heads 4 --kv-heads 2 --ffn 164 "
                "--vocab 397 --seed 27"
            ).split(),
            sequences=[[(33, 5)], [(9, 0), (18, 4), (3, 0)], [(7, 7)], [(8, 3), (1, 0), (26, 7)]],
            eval_sequences=[[(29, 6)], [(7, 0), (15, 5)]],
            seed=118,
        ),
        # The same layers with DoRA and dropout: branches count a bias, a gain and what dropout left by the same factor; eps
        # beside rows of the stream that are small; own head.
        Case(
            name="dora_granite",
            model=(
                "--arch granite --embedding-multiplier 0.03 --attention-multiplier 0.4 --residual-multiplier 1.7 "
                "--logits-scaling 0.7 --attention-bias --mlp-bias --hidden 72 --layers 2 --heads 4 --kv-heads 1 --head-dim 20 "
                "--ffn 248 --vocab 320 --untied --seed 28"
            ).split(),
            sequences=[[(40, 11)], [(5, 5), (5, 0), (33, 2)], [(6, 6)], [(48, 1)], [(13, 0), (13, 3)], [(21, 8)], [(3, 1)]],
            eval_sequences=[[(48, 7)], [(12, 0), (30, 3)]],
            seed=119,
            dropout=0.3,
            dora=True,
        ),
        # A bitsandbytes checkpoint, tests/golden/bnb_tiny_plain: no double quantization, k_proj at 16 bits. `model` is
        # what it was made from.
        Case(
            name="bnb_plain",
            model=(
                "--hidden 72 --layers 1 --heads 4 --kv-heads 2 --head-dim 20 --ffn 248 --vocab 301 "
                "--rope-scaling llama3 --seed 21"
            ).split(),
            sequences=[[(37, 9)], [(12, 0), (25, 4)], [(5, 5)], [(41, 3)], [(18, 0), (7, 1)]],
            eval_sequences=[[(30, 5)], [(9, 0), (16, 2)]],
            seed=105,
        ),
        # DoRA: blocks cross rows, every linear has a bias, magnitudes are not the norms that they belong to.
        Case(
            name="dora",
            model=(
                "--hidden 72 --layers 2 --heads 4 --kv-heads 2 --head-dim 20 --ffn 248 --vocab 397 --untied "
                "--attention-bias --mlp-bias --seed 22"
            ).split(),
            sequences=[[(40, 11)], [(5, 5), (5, 0), (33, 2)], [(6, 6)], [(48, 1)], [(13, 0), (13, 3)], [(21, 8)], [(3, 1)]],
            eval_sequences=[[(48, 7)], [(12, 0), (30, 3)]],
            settings=Settings(lr=1e-3, weight_decay=0.01),
            seed=112,
            micro_batch=3,
            dora=True,
        ),
        # The same with dropout, where peft multiplies the frozen weight by what dropout left, too.
        Case(
            name="dora_dropout",
            model=(
                "--hidden 72 --layers 2 --heads 4 --kv-heads 2 --head-dim 20 --ffn 248 --vocab 397 --untied "
                "--attention-bias --mlp-bias --seed 22"
            ).split(),
            sequences=[[(40, 11)], [(5, 5), (5, 0), (33, 2)], [(6, 6)], [(48, 1)], [(13, 0), (13, 3)], [(21, 8)], [(3, 1)]],
            eval_sequences=[[(48, 7)], [(12, 0), (30, 3)]],
            seed=113,
            dropout=0.3,
            dora=True,
        ),
        # Dropout alone, against peft with the program's own masks.
        Case(
            name="dropout",
            model="--hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 160 --vocab 320 --seed 23".split(),
            sequences=[[(17, 5)], [(9, 0), (12, 4), (3, 0)], [(1, 0), (20, 20)], [(31, 10)], [(2, 0)], [(23, 1)]],
            eval_sequences=[[(19, 6)], [(7, 0), (11, 5)]],
            seed=114,
            dropout=0.25,
        ),
        # A real model, SmolLM2-135M-Instruct: English text (TEXTS) cut into documents of these lengths.
        Case(
            name="smollm2",
            model=None,
            sequences=[
                [(44, 12)],
                [(17, 0), (26, 8), (9, 3)],
                [(8, 8)],  # nothing to learn
                [(56, 20)],
                [(33, 5)],
                [(1, 0), (38, 0)],
            ],
            eval_sequences=[[(48, 0)], [(20, 6), (24, 0)]],
            lora_rank=16,
            lora_alpha=32,
            b_deviation=0.01,
            settings=Settings(lr=2e-4),
            seed=104,
        ),
    ]
}

# English for the real model; each document begins where the one before it ended, and the text starts over at its end.
TEXT = (
    "The river rises in the hills above the old town and runs south for about forty miles before it meets the sea. "
    "In spring the water is high and cold, and the ferry does not cross until the middle of the morning. "
    "A computer with two processors can do two things at the same time, but only if neither of them has to wait for "
    "the other. To make bread you need flour, water, salt and a little yeast; mix them, let the dough rest for an "
    "hour, and bake it until the crust is brown. The moon goes around the earth once in about twenty seven days. "
    "What does the command ls do? It lists the files in a directory, one name after the other. "
    "She closed the book, put it back on the shelf and looked out of the window, where the first snow of the year had "
    "begun to fall. If you add seventeen and twenty five, you get forty two. "
    "A matrix can be multiplied by another matrix when it has as many columns as the other one has rows. "
)
