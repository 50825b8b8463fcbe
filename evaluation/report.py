"""One self-contained HTML page: tables, curves, frames and videos."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from utils.contact_sheet import thumbnail
from utils.files import write_text

_SMALLEST, _LARGEST = 96, 240  # pixels of the longer side of a thumbnail
_GAP = 4  # pixels


@dataclass(frozen=True)
class ReportExample:
    """One prompt with the videos of all methods.

    Attributes:
        strips: per method, a few frames side by side, uint8 [H, W, 3].
        video: an mp4 file of all methods side by side.
    """

    prompt: str
    strips: Sequence[np.ndarray]
    video: bytes


@dataclass(frozen=True)
class ReportTable:
    """A titled table; the first row is the header."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ReportGroup:
    """Tables about one subject, which the page shows folded."""

    title: str
    tables: Sequence[ReportTable]


def frame_strip(frames: np.ndarray) -> np.ndarray:
    """Place frames [T, H, W, 3] side by side as thumbnails; returns uint8 [H', W', 3]."""
    thumbnails = [np.asarray(thumbnail(frame, _SMALLEST, _LARGEST)) for frame in frames]
    gap = np.full((thumbnails[0].shape[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([piece for image in thumbnails for piece in (image, gap)][:-1], axis=1)


def write_report(
    path: Path,
    title: str,
    summary: str,
    labels: Sequence[str],
    commands: Sequence[tuple[str, str]],
    headline: Sequence[ReportTable],
    groups: Sequence[ReportGroup],
    meanings: Sequence[tuple[str, str]],
    curves: Path,
    examples: Sequence[ReportExample],
) -> None:
    """Write the page atomically. It needs no other file.

    Args:
        summary: a sentence on what differs between the methods.
        labels: names of the methods, in the order of every example's strips.
        commands: (title, command line) pairs.
        headline: tables of the most important metrics.
        groups: tables of all metrics.
        meanings: (metric, explanation) pairs.
        curves: a PNG file with the metrics over time.
    """
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    text = page.render(
        title=title,
        summary=summary,
        labels=labels,
        commands=commands,
        headline=headline,
        groups=groups,
        meanings=meanings,
        curves=_data_url("image/png", curves.read_bytes()),
        examples=[
            {
                "prompt": example.prompt,
                "strips": [_data_url("image/webp", _encode_webp(image)) for image in example.strips],
                "video": _data_url("video/mp4", example.video),
            }
            for example in examples
        ],
    )
    write_text(path, text)


def _encode_webp(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="WEBP", quality=90)
    return buffer.getvalue()


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1400px; margin: 2rem auto; padding: 0 1.5rem }
  h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #d5dae0 }
  nav a { margin-right: 1.2rem }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
  th, td { padding: .25rem .7rem; border-bottom: 1px solid #e6e9ed; text-align: right; white-space: nowrap }
  th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
  th { background: #f3f5f7 } td.star { background: #fff3d6 }
  pre { background: #f3f5f7; padding: .6rem .9rem; overflow-x: auto; white-space: pre-wrap; font-size: 12.5px }
  img, video { max-width: 100%; display: block }
  .strips { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: .8rem }
  figure { margin: 0 } figcaption { font-size: 12.5px; color: #59636e }
  summary { cursor: pointer; margin: .6rem 0; font-weight: 600 }
  .example { margin: 1.5rem 0 2.5rem } .example h3 { font-size: 1rem; font-weight: 600 }
  .example video { margin-bottom: .8rem; max-height: 420px }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px }
  dt { font-family: ui-monospace, monospace } dd { margin: 0 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<nav><a href="#videos">Videos</a><a href="#metrics">Metrics</a><a href="#time">Over time</a>
<a href="#commands">Commands</a></nav>
{% macro show_table(table) %}
<p>{{ table.title }}</p>
<div class="wide"><table>
<tr>{% for cell in table.rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows[1:] %}
<tr>{% for cell in row %}<td{% if cell.endswith("*") %} class="star"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro show_example(example) %}
<div class="example">
<h3>{{ example.prompt }}</h3>
<video controls loop muted playsinline preload="metadata" src="{{ example.video }}"></video>
<div class="strips">
{% for image in example.strips %}
{% set label = labels[loop.index0] %}
<figure><img src="{{ image }}" alt="{{ label }}"><figcaption>{{ label }}</figcaption></figure>
{% endfor %}
</div>
</div>
{% endmacro %}
<h2 id="videos">Videos</h2>
{% if examples %}
{{ show_example(examples[0]) }}
{% else %}
<p>No videos to show: the report was made without examples, or the methods have no video in common.</p>
{% endif %}
{% if examples | length > 1 %}
<details><summary>{{ examples | length - 1 }} more prompts</summary>
{% for example in examples[1:] %}
{{ show_example(example) }}
{% endfor %}
</details>
{% endif %}
<h2 id="metrics">Metrics</h2>
{% for table in headline %}
{{ show_table(table) }}
{% endfor %}
{% for group in groups %}
<details><summary>{{ group.title }}</summary>
{% for table in group.tables %}
{{ show_table(table) }}
{% endfor %}
</details>
{% endfor %}
<details><summary>Explanation of the metrics</summary>
<dl>{% for name, meaning in meanings %}<dt>{{ name }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl>
</details>
<h2 id="time">Over time</h2>
<details><summary>Curves over time, with bands of 95% intervals</summary>
<img src="{{ curves }}" alt="Metrics over time, one line per method">
</details>
<h2 id="commands">Commands</h2>
{% for title, command in commands %}
<p>{{ title }}</p>
<pre>{{ command }}</pre>
{% endfor %}
</body>
</html>
"""
