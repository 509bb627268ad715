"""A comparison as sheets of text, and the sheets as a terminal's tables, Markdown and LaTeX; and as CSV and JSON."""

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from benchmarks.show.report import number_text, table_text
from benchmarks.study.files import clean

STATISTICS = ("count", "mean", "std", "q25", "median", "q75")
QUANTITIES = {
    "value": "F",
    "gap": "F - F*",
    "hypergradient": "|grad F|",
    "oracles": "passes to tol",
    "time": "seconds to tol",
}
SPREADS = ("quantiles", "std")


@dataclass(frozen=True)
class Sheet:
    """A table of text: a title, what to know of it, headings and rows; the first column is a name, the rest numbers."""

    title: str
    about: str
    headings: list[str]
    rows: list[list[str]]


def _spread(found: dict[str, Any], kind: str, spec: str) -> str:
    """`median [lower quartile, upper quartile]` or `mean ± deviation`; `inf` is a cost that was never paid."""
    if kind == "std":
        deviation = f" ± {number_text(found['std'], '.2g')}" if found["std"] is not None else ""
        return number_text(found["mean"], spec) + deviation
    low, middle, high = (number_text(found[name], spec) for name in ("q25", "median", "q75"))
    if low == middle == high:
        return middle
    return f"{middle} [{number_text(found['q25'], '.2g')}, {number_text(found['q75'], '.2g')}]"


def sheets(comparison: dict[str, Any], spread: str = "quantiles") -> list[Sheet]:
    """The tables that people read: one a problem, the profiles, the ranks, the pairs."""
    what = "median [quartiles]" if spread == "quantiles" else "mean ± sample deviation, - where a run never got there"
    unit = "(F - F_L)" if comparison["by"] == "value" else "|grad F|"
    target = f"{unit} down to {comparison['tolerance']:g} of its start"
    found = []
    for problem in comparison["problems"]:
        known = all("gap" in row for row in problem["rows"])  # each seed has its own F*: F itself does not average
        names = [name for name in QUANTITIES if name != ("value" if known else "gap")]
        rows = [
            [row["solver"], f"{row['solved']}/{row['runs']}"]
            + [_spread(row[name], spread, ".5g" if name == "value" else ".3g") for name in names]
            for row in problem["rows"]
        ]
        plural = "s" if problem["seeds"] > 1 else ""
        about = f"{problem['seeds']} seed{plural}; {what}; tol: {target}"
        found.append(
            Sheet(problem["problem"], about, ["solver", "solved", *[QUANTITIES[name] for name in names]], rows)
        )
    count = len(comparison["instances"])
    for axis, profile in comparison["profiles"].items():
        solvers = list(profile["performance"])
        unit = "passes" if axis == "oracles" else "seconds"
        headings = ["ever" if math.isinf(r) else f"x{r:g}" for r in profile["ratios"]]
        parts = [[f"{f:.2f}" for f in column] for column in zip(*profile["within_ratio"], strict=True)]
        found.append(
            Sheet(
                f"Performance profile, {unit}",
                f"{count} instances; part solved within so many times the best solver's {unit} (Dolan and Moré)",
                ["solver", *headings],
                [[name, *cells] for name, cells in zip(solvers, parts, strict=True)],
            )
        )
        parts = [[f"{f:.2f}" for f in column] for column in zip(*profile["within_budget"], strict=True)]
        found.append(
            Sheet(
                f"Data profile, {unit}",
                f"{count} instances; part solved within a budget of {unit} (Moré and Wild)",
                ["solver", *[f"{budget:.3g}" for budget in profile["budgets"]]],
                [[name, *cells] for name, cells in zip(solvers, parts, strict=True)],
            )
        )
    ranks = comparison["ranks"]
    if ranks is not None:
        test = ranks["friedman"]
        about = f"{count} instances; 1 is the fewest passes to tol, ties share" + (
            f"; Friedman's chi2 = {test['statistic']:.4g}, p = {test['p']:.2g}" if test else ""
        )
        rows = [[name, f"{rank:.2f}"] for name, rank in sorted(ranks["mean_ranks"].items(), key=lambda item: item[1])]
        found.append(Sheet("Ranks", about, ["solver", "mean rank"], rows))
        rows = [
            [f"{p['a']} vs {p['b']}", *[str(p[name]) for name in ("wins", "ties", "losses")]]
            + [f"{p[name]:.2g}" for name in ("p", "p_holm")]
            for p in ranks["pairs"]
        ]
        found.append(
            Sheet(
                "Pairs",
                "Wilcoxon's signed-rank test of the log ratio of passes to tol; adjusted by Holm for all the pairs",
                ["first vs second", "first wins", "ties", "loses", "p", "p (Holm)"],
                rows,
            )
        )
    return found


def as_text(comparison: dict[str, Any], spread: str) -> str:
    """For a terminal, 120 columns wide."""
    parts = [
        f"{sheet.title}   {sheet.about}\n{table_text(sheet.headings, sheet.rows)}"
        for sheet in sheets(comparison, spread)
    ]
    return "\n".join([*parts, *[f"Note: {note}" for note in comparison["notes"]]]).rstrip() + "\n"


def as_markdown(comparison: dict[str, Any], spread: str) -> str:
    """Tables with pipes, as GitHub and mkdocs read them."""

    def cell(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text)

    parts = []
    for sheet in sheets(comparison, spread):
        lines = [f"### {cell(sheet.title)}", "", cell(sheet.about) + ".", ""]
        lines.append("| " + " | ".join(map(cell, sheet.headings)) + " |")
        lines.append("| " + " | ".join(["---", *["---:"] * (len(sheet.headings) - 1)]) + " |")
        lines += ["| " + " | ".join(map(cell, row)) + " |" for row in sheet.rows]
        parts.append("\n".join(lines) + "\n")
    if comparison["notes"]:
        parts.append("\n".join(f"- {cell(note)}" for note in comparison["notes"]) + "\n")
    return "\n".join(parts)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
          "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}", "é": r"\'e"}  # fmt: skip
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}


def latex(text: str) -> str:
    """`text` with LaTeX's own characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def as_latex(comparison: dict[str, Any], spread: str) -> str:
    """A table environment each, with the rules of the package booktabs."""
    parts = [r"% Needs \usepackage{booktabs}"]
    parts += [f"% {note}" for note in comparison["notes"]]
    for sheet in sheets(comparison, spread):
        rows = [" & ".join(map(latex, row)) + r" \\" for row in (sheet.headings, *sheet.rows)]
        columns = "l" + "r" * (len(sheet.headings) - 1)
        parts.append(
            "\n".join(
                (
                    *(r"\begin{table}", rf"\caption{{{latex(sheet.title)}: {latex(sheet.about)}.}}", r"\centering"),
                    *(rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]),
                    *(r"\bottomrule", r"\end{tabular}", r"\end{table}"),
                )
            )
        )
    return "\n".join(parts) + "\n"


def as_json(comparison: dict[str, Any], spread: str) -> str:
    """All digits; null is a number that is not finite: a cost that was never paid."""
    return json.dumps(clean(comparison), indent=1, allow_nan=False) + "\n"


def as_csv(comparison: dict[str, Any], spread: str) -> str:
    """All digits, a number a line: table, problem, solver, quantity, statistic, number."""
    lines: list[list[Any]] = []
    for problem in comparison["problems"]:
        for row in problem["rows"]:
            begin = ["problem", problem["problem"], row["solver"]]
            lines += [[*begin, name, "count", row[name]] for name in ("runs", "solved", "refuted")]
            lines += [
                [*begin, name, part, row[name][part]] for name in QUANTITIES if name in row for part in STATISTICS
            ]
    for axis, profile in comparison["profiles"].items():
        for table, limits in (("within_ratio", profile["ratios"]), ("within_budget", profile["budgets"])):
            for limit, fractions in zip(limits, profile[table], strict=True):
                named = zip(profile["performance"], fractions, strict=True)
                lines += [[table, "", solver, axis, repr(limit), fraction] for solver, fraction in named]
    ranks = comparison["ranks"]
    if ranks is not None:
        lines += [["rank", "", name, "oracles", "mean", rank] for name, rank in ranks["mean_ranks"].items()]
        lines += [["friedman", "", "", "oracles", name, value] for name, value in (ranks["friedman"] or {}).items()]
        for pair in ranks["pairs"]:
            begin = ["pair", "", f"{pair['a']} vs {pair['b']}", "oracles"]
            lines += [[*begin, name, pair[name]] for name in ("wins", "ties", "losses", "p", "p_holm")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "problem", "solver", "quantity", "statistic", "number"])
    writer.writerows(lines)
    return stream.getvalue()


FORMATS = {"text": as_text, "csv": as_csv, "json": as_json, "markdown": as_markdown, "latex": as_latex}
