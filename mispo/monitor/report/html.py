"""HTML of the report: text in, one self-contained page out. Everything from outside is escaped here."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

# Nothing that a trace contains may be loaded or run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #61676f; --page: #fff; --box: #f5f6f8;
  --line: #dcdfe4; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #9aa1ab; --page: #15171a;
  --box: #1f2226; --line: #363a41; --good: #57c26f; --bad: #ff8a80; } }
body { margin: 2rem auto; padding: 0 1.2rem; max-width: 68rem; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.soft, .soft { color: var(--soft); }
img { width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--line); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
.trace { border-top: 1px solid var(--line); padding: .8rem 0; }
.trace p { margin: 0 0 .5rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 42rem) { .pair { grid-template-columns: 1fr; } }
.pair > div { min-width: 0; }
pre { margin: .2rem 0 0; padding: .6rem .8rem; background: var(--box); border-radius: 6px; max-height: 22rem;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.good { color: var(--good); } .bad { color: var(--bad); }
"""


def escape(text: object) -> str:
    """Return text as HTML. Control characters become visible pictures; half surrogates become `?`."""
    clean = str(text).encode("utf-8", "replace").decode()
    pictures = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    return html.escape(clean.translate(pictures))


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """Write the whole document. sections: (heading, body as HTML)."""
    body = "\n".join(f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n{body}\n</body></html>\n'
    )


def image(png: bytes, description: str) -> str:
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{b64encode(png).decode()}">'


def bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool) -> str:
    """Write a table; numbers: every column but the first is right-aligned."""

    def cells(row: Sequence[str], tag: str) -> str:
        mark = ' class="number"' if numbers else ""
        return "".join(f"<{tag}{mark if i else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def trace_pair(number: int, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Show one problem with its trace before and after RL side by side."""
    problem = before or after
    assert problem is not None, "a pair has at least one trace"
    return (
        f'<div class="trace"><p><b>{number}.</b> {escape(problem["question"])}\n'
        f'<span class="soft">answer: {escape(problem["answer"])}</span></p>'
        f'<div class="pair">{_trace("before", before)}{_trace("after", after)}</div></div>'
    )


def _trace(label: str, sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return f'<div><span class="soft">{label}: not recorded</span></div>'
    reward = sample["reward"]
    shown = "-" if reward is None else f"{reward:g}"
    style = "good" if reward is not None and reward > 0.5 else "bad"
    return (
        f'<div><span class="soft">{label}, reward</span> <span class="{style}">{escape(shown)}</span>'
        f"<pre>{escape(sample['completion'])}</pre></div>"
    )
