"""Rows of all cases in one form, their tables in Markdown, and whether aims are met.

A row is
    {"what": text, "unit": "GFLOP/s" | "Gweights/s" | "tokens/s" | "s",
     "ours": {path: side}, "theirs": {setting: side}, "ratios": {name: ratio}, "facts": {name: text}, "wrong": [text, ...]}
a side {"median", "low", "high"} in that unit, with "error" (against fp64), "mib" or "note" where there is one; a side that was
left out has only a note. A ratio is {"median", "low", "high"}, with "aim" and "most" (true: the aim is an upper limit),
"ceiling" (what it would be at the bound) and "more" (true: the peer was cut off, so that the ratio is larger than this).
"""
# What a 2-core machine is to reach, products and steps by the fastest products that its CPU has (ours.aimed_at); products in fp16
# 500 of 750 GFLOP/s as well.
FP16_SHARE = 500 / 750
AIMS = {"gemm": {"fp32": 1.7, "bf16": 3.0}, "decode": {"cached": 2.0, "DRAM": 1.8}, "step": {"fp32": 1.8, "bf16": 3.0},
        "ranks": {"time": 1.05, "bytes": 0.6, "plan": 1.05}, "quantize": {"bitsandbytes": 3.0}}


def versus(path, name):
    """A ratio's name: which of our products, and the peer in which type."""
    return f"{path} : peer {name}"


def by_path(facts):
    """One text of {path: text}; the path is named where there are several."""
    return "; ".join(f"{path}: {text}" if len(facts) > 1 else text for path, text in facts.items())


def judged(ratio, aim=None, most=False, ceiling=None, more=False):
    """A figure with its aim; None stays None."""
    if ratio is None:
        return None
    out = dict(ratio)
    if aim is not None:
        out.update(aim=aim, most=most)
    if ceiling is not None:
        out["ceiling"] = ceiling
    if more:
        out["more"] = True
    return out


def met(ratio):
    """Whether the median reaches the aim; None where that is not known: no aim, or cut off below it."""
    if ratio is None or "aim" not in ratio:
        return None
    if ratio["most"]:
        return ratio["median"] <= ratio["aim"]
    if ratio["median"] >= ratio["aim"]:
        return True
    return None if ratio.get("more") else False


def number(value):
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def side_cell(side):
    """`123 (120 to 125), 812 MiB, off 1.2e-06`."""
    if side is None:
        return ""
    parts = []
    if "median" in side:
        parts.append(f"{number(side['median'])} ({number(side['low'])} to {number(side['high'])})")
    if side.get("mib"):
        parts.append(f"{side['mib']:.0f} MiB")
    if side.get("error") is not None:
        parts.append(f"off {side['error']:.1e}")
    if side.get("note"):
        parts.append(side["note"])
    return ", ".join(parts)


def ratio_cell(ratio, names_aim=False):
    """`1.85 (1.80 to 1.90) of 2.1, met`: of what it would be at the bound, where that is known."""
    if ratio is None:
        return ""
    text = f"over {number(ratio['median'])}" if ratio.get("more") else (
        f"{number(ratio['median'])} ({number(ratio['low'])} to {number(ratio['high'])})")
    if "ceiling" in ratio:
        text += f" of {number(ratio['ceiling'])}"
    if names_aim and "aim" in ratio:
        text += f", aim {ratio['aim']:g}"
    return text + {True: ", met", False: ", **not met**", None: ""}[met(ratio)]


def columns_of(rows, part):
    """Names in the order in which they first come up."""
    return list(dict.fromkeys(name for row in rows for name in row.get(part, {})))


def aims_of(rows, name):
    """{(aim, most)} of a ratio in all rows that have it."""
    return {(ratio["aim"], ratio["most"]) for row in rows for ratio in [row["ratios"].get(name)] if ratio and "aim" in ratio}


def ratio_head(rows, name):
    """A column's head, with the aim where all rows have the same."""
    aims = aims_of(rows, name)
    if len(aims) != 1:
        return f"ratio {name}"
    aim, most = aims.pop()
    return f"ratio {name}, {'at most' if most else 'aim'} {aim:g}"


def markdown_of(rows):
    """The table of one case. Columns that no row has are not there."""
    ours, theirs, ratios, facts = (columns_of(rows, part) for part in ("ours", "theirs", "ratios", "facts"))
    unit = rows[0]["unit"]
    head = ["", *(f"qshard {name}, {unit}" for name in ours), *(f"{name}, {unit}" for name in theirs),
            *(ratio_head(rows, name) for name in ratios), *facts]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["what"] + (", **WRONG**" if row.get("wrong") else ""), *(side_cell(row["ours"].get(name)) for name in ours),
                 *(side_cell(row["theirs"].get(name)) for name in theirs),
                 *(ratio_cell(row["ratios"].get(name), len(aims_of(rows, name)) > 1) for name in ratios),
                 *(row["facts"].get(name, "") for name in facts)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def wrong_of(rows):
    return [f"{row['what']}: {text}" for row in rows for text in row.get("wrong", [])]


def summary_of(cases):
    """The aims of all cases: how many rows meet each, the worst and the median row."""
    lines = ["| case | ratio | aim | rows that meet it | worst | median |", "|---" * 6 + "|"]
    for case, rows in cases.items():
        for name in columns_of(rows, "ratios"):
            for aim, most in sorted(aims_of(rows, name)):
                ratios = [row["ratios"][name] for row in rows if (row["ratios"].get(name) or {}).get("aim") == aim]
                medians = sorted((ratio["median"] for ratio in ratios), reverse=most)
                count = sum(met(row["ratios"].get(name)) is True and not row.get("wrong") for row in rows
                            if (row["ratios"].get(name) or {}).get("aim") == aim)
                lines.append(f"| {case} | {name} | {'at most ' if most else ''}{aim:g} | {count} of {len(ratios)} "
                             f"| {number(medians[0])} | {number(medians[len(medians) // 2])} |")
    return "\n".join(lines)


# --- files --------------------------------------------------------------------------------------------------------------
BEGIN, END = "<!-- cpu_peers: begin -->", "<!-- cpu_peers: end -->"


def between_marks(text, new):
    """`text` with what is between the marks replaced. ValueError where they are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"has no {BEGIN} followed by {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{new.strip()}\n{END}{after}"
