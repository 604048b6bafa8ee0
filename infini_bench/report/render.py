"""Sheets as Markdown, LaTeX (booktabs), one self-contained HTML page, or rich tables on a terminal."""

from __future__ import annotations

import re
from base64 import b64encode

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from infini_bench.report.layouts import Sheet

NUMBER = re.compile(r"[^\w\s]*\d")  # how a cell of numbers begins: 12, +0.03, [1, 2], <5
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#",
    "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$", "—": "--", "…": r"\ldots{}",
})  # fmt: skip

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>infini-bench results</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
.sheet { overflow-x: auto; }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; }
th { border-bottom: 1px solid; font-weight: 600; vertical-align: bottom; }
th, td { padding: .25rem .7rem; text-align: right; white-space: pre-line; vertical-align: top; }
th:first-child, td:first-child, .text { text-align: left; }
caption, .note { text-align: left; color: #555; }
code { font-size: .85em; }
img { max-width: 100%; }
</style>
</head>
<body>
<h1>infini-bench results</h1>
<p class="note">Every number comes from the records named under its table. Paper: {{ source }}.</p>
<ul>{% for sheet in sheets %}<li><a href="#s{{ loop.index }}">{{ sheet.title }}</a></li>{% endfor %}
{% if pictures %}<li><a href="#figures">Figures</a></li>{% endif %}</ul>
{% for sheet in sheets %}
{% set classes = aligned(sheet) %}
<h2 id="s{{ loop.index }}">{{ sheet.title }}</h2>
<p class="note">{{ sheet.caption }}</p>
{% if sheet.rows %}
<div class="sheet"><table>
<thead><tr>
{% for column in sheet.columns %}<th class="{{ classes[loop.index0] }}">{{ column.title }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for row in sheet.rows %}<tr>
{% for cell in row %}<td class="{{ classes[loop.index0] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endif %}
{% if sheet.failures %}
<p>Runs without a result:</p>
<ul>{% for failure in sheet.failures %}<li>{{ failure }}</li>{% endfor %}</ul>
{% endif %}
{% if sheet.records %}
<details><summary>{{ sheet.records | length }} records</summary>
<ul>{% for id in sheet.records %}<li><code>{{ id }}</code></li>{% endfor %}</ul></details>
{% endif %}
{% endfor %}
{% if pictures %}
<h2 id="figures">Figures</h2>
{% for name, data in pictures.items() %}
<figure><figcaption>{{ name }}</figcaption>
<img alt="{{ name }}" src="data:image/svg+xml;base64,{{ data }}"></figure>
{% endfor %}
{% endif %}
</body>
</html>
"""


def markdown(sheets: list[Sheet]) -> str:
    return "\n".join(_markdown(sheet) for sheet in sheets)


def _markdown(sheet: Sheet) -> str:
    parts = [f"## {sheet.title}", sheet.caption]
    if sheet.rows:
        header = [column.title for column in sheet.columns]
        rule = [":--", *("--:" for _ in header[1:])]
        parts.append(
            "\n".join("| " + " | ".join(map(_flat, row)) + " |" for row in [header, rule, *sheet.rows])
        )
    if sheet.failures:
        parts.append(
            "\n".join(["Runs without a result:", "", *(f"- {_flat(text)}" for text in sheet.failures)])
        )
    return "\n\n".join(parts) + "\n"


def _flat(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", " ").replace("*", r"\*")


def latex(sheets: list[Sheet]) -> str:
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex(sheet) for sheet in sheets)


def _latex(sheet: Sheet) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join(cell.translate(LATEX).replace("\n", " ") for cell in cells) + r" \\"

    body = [
        r"\begin{tabular}{l" + "r" * (len(sheet.columns) - 1) + "}",
        r"\toprule",
        line([column.title for column in sheet.columns]),
        r"\midrule",
        *map(line, sheet.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    caption = rf"\caption{{{f'{sheet.title}. {sheet.caption}'.translate(LATEX)}}}"
    failures = [f"% without a result: {text}" for text in sheet.failures]
    return (
        "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                caption,
                *(body if sheet.rows else []),
                *failures,
                r"\end{table}",
            ]
        )
        + "\n"
    )


def html(sheets: list[Sheet], source: str, figures: dict[str, str]) -> str:
    """figures: SVG by name. Each is an image of its own, since their classes and ids have the same names."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    pictures = {name: b64encode(svg.encode()).decode() for name, svg in figures.items()}
    return page.render(sheets=sheets, source=source, pictures=pictures, aligned=_aligned)


def _aligned(sheet: Sheet) -> list[str]:
    """The class of each column's cells: words stand left, numbers right."""
    columns = [[cell for cell in cells if cell not in ("", "—")] for cells in zip(*sheet.rows, strict=True)]
    words = [2 * sum(NUMBER.match(cell) is None for cell in cells) > len(cells) for cells in columns]
    return ["text" if each else "number" for each in words]


def show(sheets: list[Sheet], console: Console) -> None:
    """Print the sheets with their narrow columns."""
    for sheet in sheets:
        console.print(_terminal(sheet))


def _terminal(sheet: Sheet) -> RenderableType:
    parts: list[RenderableType] = [Text(sheet.title, style="bold")]
    shown = [i for i, column in enumerate(sheet.columns) if not column.wide]
    if sheet.rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i in shown:
            table.add_column(
                sheet.columns[i].title, justify="right" if i else "left", no_wrap=i == 0, overflow="fold"
            )
        for row in sheet.rows:
            table.add_row(*(Text(row[i]) for i in shown))
        parts.append(table)
    notes = [sheet.caption, *(f"without a result: {text}" for text in sheet.failures)]
    return Padding(Group(*parts, *(Text(note, style="dim") for note in notes)), (1, 0))
