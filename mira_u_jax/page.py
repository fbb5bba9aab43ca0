"""One HTML page of runs, to be sent or opened anywhere: tables, curves, and the worst cases to sort. Nothing is fetched."""

import base64
import html
import io
import json
import pathlib
import re

from PIL import Image

from mira_u_jax.errors import UserError
from mira_u_jax.figures import CURVES

SETTINGS = ("method", "ablate", "frac", "label_seed", "seed", "preset", "size", "split")
COLOURS = ("#0b6e99", "#c2410c", "#3f7d20", "#8a3ffc", "#a8326e")


def write(runs, output) -> pathlib.Path:
    """Write the page of run folders to the file `output`.

    runs: folders as main leaves them; what one lacks (evaluation.json, metrics.jsonl, figures/, cases/) is left out. Raises
    UserError where there is no run at all.
    """
    runs = [pathlib.Path(run) for run in runs]
    for run in runs:
        if not (run / "config.json").is_file():
            raise UserError(f"{run} holds no config.json: give folders that main has trained in")
    if not runs:
        raise UserError("no runs to report on: give folders that main has trained in")
    names = [run.name if [r.name for r in runs].count(run.name) == 1 else str(run) for run in runs]
    sections = [section(run, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
    body = f"<h1>MIRA-U runs</h1>{summary(runs, names)}{''.join(sections)}<footer>Not a medical device.</footer>"
    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(PAGE.replace("@BODY@", body))
    return output


def read(path, default):
    return json.loads(path.read_text()) if path.is_file() else default


def summary(runs, names) -> str:
    """One row a run: its settings and its figures with intervals; a click on a head sorts."""
    results = [read(run / "evaluation.json", {}) for run in runs]
    settings = [read(run / "config.json", {})["config"] for run in runs]
    figures = list(dict.fromkeys(k for result in results for k, v in result.items() if isinstance(v, int | float)))
    keys = [key for key in SETTINGS if any(key in s for s in settings)]
    rows = []
    for i, (name, setting, result) in enumerate(zip(names, settings, results, strict=True)):
        cells = [f'<th scope="row"><a href="#run{i}">{html.escape(name)}</a></th>']
        cells += [cell(setting.get(key, "")) for key in keys]
        cells += [cell(result.get(key), result.get("ci95", {}).get(key)) for key in figures]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    said = "In brackets: 95% of image bootstraps, how exact one run is."
    return f"<h2>Runs</h2>{table(['run', *keys, *figures], rows)}<p>{said}</p>"


def table(heads, rows) -> str:
    head = "".join(f'<th scope="col"><button type="button">{html.escape(h)}</button></th>' for h in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def cell(value, interval=None) -> str:
    if value is None:
        return "<td></td>"
    text = f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
    between = f"<small> [{interval[0]:.3g}, {interval[1]:.3g}]</small>" if interval else ""
    return f'<td data-value="{html.escape(str(value))}">{text}{between}</td>'


def section(run: pathlib.Path, name: str, i: int) -> str:
    """Curves, the last training picture and the worst cases of one run."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
    points = [row for row in map(json.loads, lines) if row["split"] == "train"]
    known = {name for row in points for name in row}
    drawn = [curve(title, names, points) for title, names in CURVES.items() if known & set(names)]
    parts = [f'<section id="run{i}"><h2>{html.escape(name)}</h2><div class="grid">{"".join(drawn)}</div>']
    if pictures := sorted((run / "figures").glob("train_*.png")):
        parts.append(f"<h3>Last training picture</h3>{image(pictures[-1], 'the end of training')}")
    parts += [gallery(folder) for folder in sorted((run / "cases").glob("*")) if (folder / "cases.json").is_file()]
    return "".join(parts) + "</section>"


def curve(title: str, names, rows) -> str:
    """An SVG of curves by step, with its legend."""
    width, height, left, bottom = 320, 180, 40, 20
    lines = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    lines = {name: points for name, points in lines.items() if points}
    steps = [x for points in lines.values() for x, _ in points]
    values = [y for points in lines.values() for _, y in points]
    (x0, x1), (y0, y1) = (min(steps), max(steps)), (min([0, *values]), max(values))

    def place(x, y):
        across = left + (width - left - 8) * (x - x0) / max(x1 - x0, 1)
        return f"{across:.1f},{8 + (height - bottom - 8) * (1 - (y - y0) / max(y1 - y0, 1e-9)):.1f}"

    drawn = "".join(
        f'<polyline points="{" ".join(place(*point) for point in points)}" stroke="{colour}"/>'
        for points, colour in zip(lines.values(), COLOURS, strict=False)
    )
    corners = (
        (left - 4, 14, "end", f"{y1:.3g}"), (left - 4, height - bottom, "end", f"{y0:.3g}"),
        (left, height - 4, "start", x0), (width - 8, height - 4, "end", x1),
    )
    ticks = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in corners)
    frame = f'<path class="axis" d="M{left} 8V{height - bottom}H{width - 8}"/>'
    legend = " ".join(f'<span style="color:{c}">{html.escape(n)}</span>' for n, c in zip(lines, COLOURS, strict=False))
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{frame}{ticks}{drawn}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}<p class=legend>{legend}</p></figure>"


def gallery(folder: pathlib.Path) -> str:
    """The pictures of an evaluation's worst cases, with buttons that sort them, and the figures of all images."""
    kept = json.loads((folder / "cases.json").read_text())
    rows = kept["cases"]
    shown = [row for row in rows if "picture" in row]
    if not shown:
        return ""
    keys = [key for key in shown[0] if key != "picture"]
    buttons = " ".join(f'<button type="button" data-key="{html.escape(key)}">{html.escape(key)}</button>' for key in keys)
    cards = []
    for row in sorted(shown, key=lambda row: row["picture"]):
        data = " ".join(f'data-{re.sub("[^a-z0-9]", "", key.lower())}="{html.escape(str(row[key]))}"' for key in keys)
        said = ", ".join(f"{key} {row[key]:.3f}" for key in keys if key != "id" and key in row)
        picture = image(folder / row["picture"], f"{row['id']}: {', '.join(kept['parts'])}")
        cards.append(f"<figure {data}><figcaption><b>{html.escape(row['id'])}</b> {said}</figcaption>{picture}</figure>")
    every = [f"<tr>{''.join(cell(row.get(key)) for key in keys)}</tr>" for row in rows]
    return (
        f'<h3>Worst cases: {html.escape(folder.name)}</h3><p>Each: {", ".join(kept["parts"])}. Sort by {buttons}</p>'
        f'<div class="grid wide">{"".join(cards)}</div><details><summary>All {len(rows)} images</summary>'
        f"{table(keys, every)}</details>"
    )


def image(path: pathlib.Path, alt: str) -> str:
    """The picture at `path` inside the page, as JPEG."""
    with Image.open(path) as opened:
        width, height = opened.size
        buffer = io.BytesIO()
        opened.convert("RGB").save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{width}" height="{height}"'
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{html.escape(alt)}" loading="lazy">'


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>MIRA-U runs</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 75rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
button { font: inherit; color: inherit; background: none; cursor: pointer; border: 1px solid var(--line); }
button { border-radius: .3rem; }
thead button { border: 0; padding: 0; font-weight: 600; text-decoration: underline dotted; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1rem; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
img, svg { max-width: 100%; height: auto; display: block; }
img { outline: 1px solid var(--line); }
svg text { font-size: 10px; fill: currentColor; }
polyline { fill: none; stroke-width: 1.5; }
.axis { fill: none; stroke: currentColor; opacity: .4; }
.legend { margin: 0; font-size: .8rem; display: flex; flex-wrap: wrap; gap: .2rem .8rem; }
footer { margin-top: 2rem; font-size: .85rem; }
</style></head><body>
@BODY@
<script>
const value = text => text !== "" && !isNaN(text) ? Number(text) : text;
const order = (of, down) => (a, b) => {
  const x = of(a), y = of(b);
  return (typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1) * (down ? -1 : 1);
};
const turn = button => button.dataset.down = button.dataset.down === "" ? "1" : "";
for (const table of document.querySelectorAll("table"))
  for (const [i, button] of [...table.querySelectorAll("thead button")].entries())
    button.onclick = () => {
      const body = table.tBodies[0], down = turn(button);
      const of = row => value(row.cells[i].dataset.value ?? row.cells[i].textContent);
      body.append(...[...body.rows].sort(order(of, down)));
    };
for (const button of document.querySelectorAll("button[data-key]"))
  button.onclick = () => {
    const grid = button.parentElement.nextElementSibling, down = turn(button);
    const key = button.dataset.key.toLowerCase().replace(/[^a-z0-9]/g, "");
    grid.append(...[...grid.children].sort(order(card => value(card.dataset[key]), down)));
  };
</script></body></html>
"""
