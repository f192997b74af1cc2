"""Pages that need nothing else: one HTML file with plotly's script in it. plotly is imported where one is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Figure = dict[str, Any]
"""A figure as plotly takes it: `data` and `layout`."""

INK, FAINT, GRID = "#22303c", "#566370", "#e6e9ed"
"""Of text, of captions and axis titles, of lines."""


def document(*, title: str, answer: str, body: Sequence[str], figures: Mapping[str, Figure]) -> str:
    """A page: its title, the sentence that answers what one wants to know, and what follows as HTML.

    `figures` go into the elements of these ids (`figure_place`).
    """
    from plotly.offline import get_plotlyjs

    scripts = [
        f"Plotly.newPlot({name!r}, {_script(figure | {'config': _CONFIG})});"
        for name, figure in figures.items()
    ]
    return _PAGE.format(
        title=escape(title),
        answer=escape(answer),
        body="\n".join(body),
        plotly=get_plotlyjs(),
        scripts="\n".join(scripts),
    )


def section(title: str, caption: str, content: str) -> str:
    """A heading, a line or two on what is to be seen, and the content as HTML."""
    said = f"<p>{escape(caption)}</p>\n" if caption else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}{content}\n</section>"


def figure_place(name: str) -> str:
    """Where the figure of this id is drawn."""
    return f'<div id="{name}" class="figure"></div>'


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and texts."""
    items = "\n".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in rows)
    return f"<dl>\n{items}\n</dl>"


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Large figures and what they are of."""
    items = "\n".join(
        f"<div><strong>{escape(value)}</strong><span>{escape(of)}</span></div>" for value, of in figures
    )
    return f'<div class="tiles">\n{items}\n</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text in the first column and numbers in the others."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def plain_layout(x: str, y: str, **more: Any) -> Figure:
    """The layout of a figure with these axis titles; `more` replaces or adds to it."""
    return {
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 13,
            "color": INK,
        },
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "margin": {"l": 90, "r": 20, "t": 10, "b": 50},
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": GRID, "font": {"color": INK}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        "xaxis": axis(x),
        "yaxis": axis(y),
        **more,
    }


def axis(title: str, **more: Any) -> Figure:
    """An axis in the look of all figures."""
    return {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "automargin": True,
        "title": {"text": title, "font": {"size": 13, "color": FAINT}},
        **more,
    }


def _script(value: object) -> str:
    """As JSON that cannot end a script element."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")


_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22303c; margin: 0;
  background: #f5f6f8; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 28px 36px 48px; background: #fff; }}
h1 {{ font-size: 24px; line-height: 1.3; margin: 0 0 6px; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 34px 0 2px; }}
p {{ margin: 2px 0 8px; color: #566370; }}
p.answer {{ font-size: 17px; color: inherit; font-weight: 600; margin: 0 0 14px; }}
dl {{ display: grid; grid-template-columns: 84px 1fr; gap: 2px 12px; margin: 0; font-size: 14px; }}
dt {{ color: #566370; }}
dd {{ margin: 0; overflow-wrap: anywhere; white-space: pre-line; }}
.figure {{ width: 100%; }}
.tiles {{ display: grid; gap: 12px; margin: 18px 0 20px;
  grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); }}
.tiles div {{ background: #f5f6f8; border-radius: 6px; padding: 10px 14px; }}
.tiles strong {{ display: block; font-size: 22px; line-height: 1.3; font-weight: 600; white-space: nowrap; }}
.tiles span {{ color: #566370; font-size: 13px; }}
@media (max-width: 880px) {{
  main {{ padding: 24px 24px 40px; }}
  .tiles {{ grid-template-columns: repeat(3, 1fr); }}
}}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; margin: 8px 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 18px 5px 0; border-bottom: 1px solid #e6e9ed; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; min-width: 150px; }}
th {{ color: #566370; font-weight: 500; }}
tr:last-child td {{ font-weight: 600; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="answer">{answer}</p>
{body}
</main>
<script>{plotly}</script>
<script>
{scripts}
</script>
</body>
</html>
"""
