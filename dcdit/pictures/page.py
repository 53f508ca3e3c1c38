"""A page that puts pictures and a table together."""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = (
    "body {font: 16px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1d2433}"
    " img {max-width: 100%} pre {background: #f3f4f7; padding: 1em; overflow-x: auto} figure {margin: 2.5em 0}"
    " figcaption {color: #5a6375}"
)


def write_page(file: Path, title: str, paragraphs: list[str], table: str, figures: dict[str, str]) -> None:
    """Write HTML: the title, the paragraphs, the table as text, then each picture, a file beside the page, with its
    caption."""
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in paragraphs)]
    parts.append(f"<pre>{escape(table)}</pre>")
    for name, caption in figures.items():
        image = f'<img src="{escape(name)}" alt="{escape(caption)}">'
        parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    file.write_text("\n".join([head, *parts, "</html>\n"]), encoding="utf-8")
