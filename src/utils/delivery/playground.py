"""A page to try a model: paste a prompt and two answers, or score a file of battles.

It listens on this machine only, unless told otherwise, and asks nothing of any other. Every text
that people type, upload or draw is shown as text. No state is shared between visitors.
"""

import argparse
import functools
import gzip
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

# Before the import, which would ask for the newest version otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="playground-"))

import gradio as gr
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from src.utils import paths
from src.utils.battles.readers import iter_battles
from src.utils.battles.style import STYLE_FEATURES
from src.utils.config import SuiteError
from src.utils.delivery.predictor import Answer, Predictor
from src.utils.runs import read_pairs
from src.utils.schema import (
    LABEL_COLORS,
    LABEL_NAMES,
    LABELS,
    TEXTS,
    clean_text,
    swap_pairs,
    swap_probs,
)

MAX_CHARS = 200_000  # of a battle
MAX_TURNS = 4
MAX_ROWS = 20_000  # of a file
MAX_FILE_MB, MAX_UNPACKED_MB = 20, 100
_MAX_BODY = 4 * 2**20  # bytes of a request that is no upload
_N_ROWS = 200  # of a file at once; visitors with a single battle wait no longer than for these
_N_DRAWN = 500  # battles that the button draws from
_N_TERMS = 8  # style differences that are shown
_KEEP_S = 3600  # files of visitors
_MISTAKES = (ValueError, OSError, RuntimeError, SuiteError)

EXAMPLES = [
    (
        "How do I keep basil alive in winter?",
        "Put it on a south-facing window sill, water it when the top of the soil is dry, and turn "
        "it every few days. Below 10 °C it suffers:\n\n- no draught\n- no cold water\n- pinch off "
        "flowers",
        "Basil is an annual.",
    ),
    (
        "Write a limerick about a cat.",
        "A cat with a very long tail\nwent out for a walk in a gale;\n  it came back inside\n"
        "  with leaves as its pride\nand told every mouse of the tale.",
        "I'm sorry, but as an AI language model I cannot write a limerick about a cat.",
    ),
    (
        "What is 17 × 23?",
        "17 × 23 = **391**",
        "To multiply 17 by 23, split 23 into 20 and 3. First, 17 × 20 = 340. Then, 17 × 3 = 51. "
        "Adding both gives 340 + 51 = 391. So the answer is 391.",
    ),
    ("Say hello.", "Hello!", "Hello!"),
]
_CSS = f"""
.pg {{ font-variant-numeric: tabular-nums; }}
.pg h4 {{ margin: 18px 0 6px; font-weight: 600; }}
.pg table {{ width: 100%; border-collapse: collapse; border: 0; margin: 0; }}
.pg th, .pg td {{ border: 0 !important; border-bottom: 1px solid #8883 !important;
  padding: 4px 0 4px 10px; text-align: right; font-weight: normal; vertical-align: bottom; }}
.pg td {{ white-space: nowrap; }}
.pg th:first-child, .pg td:first-child {{ text-align: left; padding-left: 0; white-space: normal; }}
.pg thead th {{ opacity: .7; font-size: .85em; }}
.pg .bar {{ display: grid; grid-template-columns: 4.5em 1fr 4em; align-items: center;
  gap: 8px; margin: 4px 0; }}
.pg .bar i, .pg .term i {{ display: block; height: 20px; border-radius: 3px; min-width: 1px; }}
.pg b {{ text-align: right; }}
.pg .term {{ display: grid; grid-template-columns: minmax(7em, 34%) 1fr 1fr 4em;
  align-items: center; margin: 3px 0; line-height: 1.25; }}
.pg .term i {{ height: 14px; }} .pg .term i.left {{ margin-left: auto; }}
.pg .note {{ opacity: .75; font-size: .9em; overflow-wrap: anywhere; }}
.pg .bad {{ border-left: 4px solid {LABEL_COLORS[1]}; padding: 6px 10px; overflow-wrap: anywhere; }}
.pg .chip {{ color: white; border-radius: 9px; padding: 1px 9px; }}
#actions button {{ font-size: 1rem; white-space: nowrap; }}
footer {{ display: none !important; }}
@media (max-width: 500px) {{
  .pg table {{ font-size: .8em; }} .pg th, .pg td {{ padding-left: 5px; }}
  #actions button {{ font-size: .85rem; }}
}}
"""


def make_page(predictor: Predictor) -> gr.Blocks:
    """Build the page for a model that is loaded, or whose networks are still being loaded."""
    drawer = _Drawer(predictor)
    outputs = Path(tempfile.mkdtemp(prefix="out-", dir=os.environ["GRADIO_TEMP_DIR"]))
    with gr.Blocks(
        title="LLM Preference Arena", analytics_enabled=False, delete_cache=(_KEEP_S, _KEEP_S)
    ) as page:
        gr.Markdown("# Which answer do people prefer?")
        status = gr.HTML(_show_status(predictor))
        timer = gr.Timer(1.0, active=not predictor.is_ready)
        timer.tick(
            lambda: (_show_status(predictor), gr.Timer(active=not predictor.is_ready)),
            outputs=[status, timer],
            show_progress="hidden",
            api_visibility="private",
        )
        with gr.Tab("Two answers"):
            _add_battle_tab(predictor, drawer)
        with gr.Tab("A file of battles"):
            _add_file_tab(predictor, outputs)

        def battle(
            prompt: list[str], response_a: list[str], response_b: list[str]
        ) -> dict[str, float]:
            """Predict one battle; a text is the list of its turns."""
            try:
                pairs = make_battle([prompt, response_a, response_b])
                probs = predictor.predict(pairs).probs[0]
            except _MISTAKES as error:
                raise gr.Error(escape(str(error)), print_exception=False) from error
            return dict(zip(LABELS, probs.tolist(), strict=True))

        gr.api(battle, api_name="battle", concurrency_limit=8)
    return page.queue(max_size=256, default_concurrency_limit=8)


def _add_battle_tab(predictor: Predictor, drawer: "_Drawer") -> None:
    n_turns, drawn = gr.State(1), gr.State("")
    rows, boxes = [], []
    for turn in range(MAX_TURNS):
        number = f" {turn + 1}" if turn else ""
        with gr.Group(visible=turn == 0) as row:
            boxes.append(gr.Textbox(label=f"Prompt{number}", lines=2, max_lines=8))
            with gr.Row():
                for side in "AB":
                    name = f"Answer {side}{number}"
                    boxes.append(gr.Textbox(label=name, lines=5, max_lines=14, min_width=260))
        rows.append(row)
    with gr.Row(elem_id="actions"):
        go = gr.Button("Predict the vote", variant="primary", elem_id="predict")
        swap = gr.Button("Exchange A and B", elem_id="exchange")
        more = gr.Button("Add a turn", elem_id="more")
        draw = gr.Button("Draw a battle", elem_id="draw", visible=drawer.has_battles)
        clear = gr.Button("Clear", elem_id="clear")
    with gr.Row():
        samples = [gr.Button(texts[0], size="sm", min_width=140) for texts in EXAMPLES]
    result = gr.HTML(elem_id="result", apply_default_css=False)
    shown = [n_turns, drawn, *rows, *boxes]

    def fill(texts: Sequence[Sequence[str]], note: str = "") -> list[Any]:
        """Fill the page with a battle: turns of prompt, answer A and answer B."""
        n = max(map(len, texts))
        values = [""] * len(boxes)
        for place, turns in enumerate(texts):
            for turn, text in enumerate(turns[:MAX_TURNS]):
                values[3 * turn + place] = clean_text(text)
        return [n, note, *(gr.Group(visible=turn < n) for turn in range(MAX_TURNS)), *values]

    def read(n: int, values: Sequence[str]) -> list[list[str]]:
        return [list(values[place : 3 * n : 3]) for place in range(3)]

    def predict(n: int, note: str, *values: str) -> str:
        try:
            pairs = make_battle(read(n, values))
            return note + show_prediction(predictor, pairs)
        except _MISTAKES as error:
            return _show_mistake(error)

    def exchange(n: int, note: str, *values: str) -> list[Any]:
        prompt, a, b = read(n, values)
        return fill([prompt, b, a])

    def add_turn(n: int, note: str, *values: str) -> list[Any]:
        return fill(read(min(n + 1, MAX_TURNS), values))

    def draw_battle() -> list[Any]:
        return fill(*drawer.draw())

    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    given = [n_turns, drawn, *boxes]
    answer: dict[str, Any] = {"fn": predict, "inputs": given, "outputs": result} | options
    go.click(**answer)
    swap.click(exchange, given, shown, **options).then(**answer)
    draw.click(draw_battle, None, shown, **options).then(**answer)
    more.click(add_turn, given, shown, **options)
    clear.click(lambda: [*fill([[""]] * 3), ""], None, [*shown, result], **options)
    for button, texts in zip(samples, EXAMPLES, strict=True):
        example = functools.partial(fill, [[text] for text in texts])
        button.click(example, None, shown, **options).then(**answer)


def _add_file_tab(predictor: Predictor, outputs: Path) -> None:
    gr.Markdown(
        "Any layout that the suite reads, votes or none: csv, tsv, jsonl (also .gz) or parquet, up "
        f"to {MAX_FILE_MB} MB and {MAX_ROWS:,} battles. For more: `arena-predict`."
    )
    upload = gr.File(label="Battles", file_types=list(paths.TABLE_SUFFIXES), elem_id="upload")
    go = gr.Button("Predict all", variant="primary", elem_id="score")
    result = gr.HTML(elem_id="file-result", apply_default_css=False)
    download = gr.File(label="Probabilities", interactive=False, visible=False, elem_id="probs")

    def score(path: str | None, progress: gr.Progress = gr.Progress()) -> tuple[str, Any]:  # noqa: B008 gradio finds it by its default
        try:
            if not path:
                raise ValueError("expected a file of battles, got none; choose one above")
            table, text = score_file(predictor, Path(path), progress)
        except _MISTAKES as error:
            return _show_mistake(error), gr.File(visible=False)
        _remove_old(outputs)
        folder = Path(tempfile.mkdtemp(dir=outputs))
        table.to_csv(folder / "probabilities.csv", index=False)
        return text, gr.File(str(folder / "probabilities.csv"), visible=True)

    go.click(
        score,
        upload,
        [result, download],
        api_name="score",
        concurrency_limit=1,
        show_progress="full",
    )


def make_battle(texts: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Make a table of one battle from the turns of prompt, answer A and answer B.

    Raises:
        ValueError: it is longer than `MAX_CHARS` or has more than `MAX_TURNS` turns, or something
            is no text.
    """
    n_chars = 0
    for name, turns in zip(TEXTS, texts, strict=True):
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{name}: expected a list of texts, one per turn")
        if not 0 < len(turns) <= MAX_TURNS:
            raise ValueError(f"{name}: expected 1 to {MAX_TURNS} turns, got {len(turns)}")
        n_chars += sum(map(len, turns))
    _check_length(n_chars, "the battle")
    row = {name: [tuple(turns)] for name, turns in zip(TEXTS, texts, strict=True)}
    return pd.DataFrame({"id": ["1"], **row})


def _check_length(n_chars: int, what: str) -> None:
    if n_chars > MAX_CHARS:
        raise ValueError(f"{what}: expected at most {MAX_CHARS:,} characters, got {n_chars:,}")


def score_file(
    predictor: Predictor, path: Path, progress: Any = lambda share, desc: None
) -> tuple[pd.DataFrame, str]:
    """Predict a file of any layout: the table of id and probabilities, and what to say about it.

    `progress` is called with the share that is done and a text.

    Raises:
        ValueError: it is no table of battles, or larger than a limit of this page.
    """
    _check_size(path)
    parts: list[pd.DataFrame] = []
    notes: dict[str, None] = {}  # in order, each once
    n_rows, start = 0, time.monotonic()
    for chunk in iter_battles(path, _N_ROWS):
        n_rows += len(chunk.pairs)
        if n_rows > MAX_ROWS:
            raise ValueError(f"{path.name}: expected at most {MAX_ROWS:,} battles, got more")
        for row in chunk.pairs.itertuples(index=False):
            n_chars = sum(len(turn or "") for turns in row[1:] for turn in turns)
            _check_length(n_chars, f"{path.name}, id {row.id}")
        answer = predictor.predict(chunk.pairs)
        parts.append(pd.DataFrame(answer.probs, columns=list(LABELS)))
        parts[-1].insert(0, "id", chunk.pairs["id"])
        notes |= dict.fromkeys(answer.notes)
        notes |= {f"odd cell: {', '.join(map(str, odd.values()))}": None for odd in chunk.problems}
        left_s = (time.monotonic() - start) * (1 / max(chunk.share, 1e-3) - 1)
        progress(chunk.share, desc=f"{n_rows:,} battles, {left_s:.0f} s left")
    table = pd.concat(parts, ignore_index=True)
    head = f"<p>{len(table):,} battles in {time.monotonic() - start:.1f} s. On average:</p>"
    bars = _draw_bars(table[list(LABELS)].mean().to_numpy()) if len(table) else ""
    items = "".join(f"<li>{_escape(note)}</li>" for note in list(notes)[:20])
    return table, f"<div class='pg'>{head}{bars}<ul class='note'>{items}</ul></div>"


def _check_size(path: Path) -> None:
    limit = MAX_UNPACKED_MB * 10**6
    size = path.stat().st_size
    if size > MAX_FILE_MB * 10**6:
        got = f"{size / 1e6:.0f} MB"
        raise ValueError(f"{path.name}: expected at most {MAX_FILE_MB} MB, got {got}")
    name = path.name.lower()
    if not name.endswith(paths.TABLE_SUFFIXES):
        raise ValueError(f"{path.name}: expected one of {', '.join(paths.TABLE_SUFFIXES)}")
    if name.endswith(".gz"):
        size = 0
        with gzip.open(path) as file:
            while size <= limit and (block := file.read(1 << 20)):
                size += len(block)
    elif name.endswith(".parquet"):
        try:
            metadata = pq.read_metadata(path)
        except Exception as error:
            raise ValueError(f"{path.name}: expected parquet, got {error}") from error
        size = sum(
            metadata.row_group(place).total_byte_size for place in range(metadata.num_row_groups)
        )
    if size > limit:
        raise ValueError(f"{path.name}: expected at most {MAX_UNPACKED_MB} MB unpacked, got more")


def _remove_old(folder: Path) -> None:
    for file in folder.glob("*/*"):
        if time.time() - file.stat().st_mtime > _KEEP_S:
            file.unlink(missing_ok=True)
            file.parent.rmdir()


class _Drawer:
    """Draws battles from the data of a model, with what people voted."""

    def __init__(self, predictor: Predictor) -> None:
        artifacts = predictor.source.artifacts
        self._folder = artifacts / "01_eda" if artifacts else Path()
        self._battles: pd.DataFrame | None = None
        self._lock = threading.Lock()

    @property
    def has_battles(self) -> bool:
        """Whether there is anything to draw from."""
        return (self._folder / "pairs.parquet").exists()

    def draw(self) -> tuple[list[list[str]], str]:
        """Draw a battle: the turns of its texts, and a line of HTML about the vote."""
        with self._lock:
            if self._battles is None:
                self._battles = self._read()
        battle = self._battles.iloc[random.randrange(len(self._battles))]
        texts = [[turn or "" for turn in battle[name]] for name in TEXTS]
        label = int(battle["label"])
        look = f"class='chip' style='background:{LABEL_COLORS[label]}'"
        known = f"People voted: <span {look}>{LABEL_NAMES[label]}</span>"
        if "model_a" in battle.index:
            known += f" (A is {_escape(battle['model_a'])}, B is {_escape(battle['model_b'])})"
        return texts, f"<div class='pg'><p>{known}. {self._origin}</p></div>"

    def _read(self) -> pd.DataFrame:
        arena = self._folder / "arena"
        self._origin = "The model has learned from this battle, so it knows more than it should."
        if (arena / "votes_test.parquet").exists():
            self._origin = "A simulated battle that the model has not seen."
            chunk = next(iter_battles(arena / "test.csv", _N_DRAWN))
            votes = pd.read_parquet(arena / "votes_test.parquet").astype({"id": str})
            battles = chunk.pairs.merge(votes, on="id")
        else:
            battles = read_pairs(self._folder / "pairs.parquet")
            battles = battles.sample(min(len(battles), _N_DRAWN), random_state=0)
        is_short = [
            max(map(len, texts)) <= MAX_TURNS
            and sum(len(turn or "") for turns in texts for turn in turns) <= MAX_CHARS
            for texts in battles[list(TEXTS)].itertuples(index=False, name=None)
        ]
        return battles[is_short]


# ---- what is shown ---------------------------------------------------------------------------


def show_prediction(predictor: Predictor, pairs: pd.DataFrame) -> str:
    """Predict one battle as it is and with its answers exchanged: HTML."""
    both = pd.concat([pairs, swap_pairs(pairs)], ignore_index=True)
    answer = predictor.predict(both, ask_all=True)
    given, exchanged = answer.probs[0], swap_probs(answer.probs[1])
    parts = [_draw_bars(given), _show_exchanged(given, exchanged), _show_members(predictor, answer)]
    if predictor.baseline:
        terms = predictor.baseline.style_terms(pairs).iloc[0]
        if len(pairs["prompt"].iloc[0]) == 1:  # its first and last turn are the prompt
            terms["prompt_overlap"] += terms.pop("prompt_overlap_first")
            terms["prompt_overlap"] += terms.pop("prompt_overlap_last")
        parts.append(_show_terms(terms))
    notes = [*answer.notes, *(() if predictor.is_ready else ("The networks are still loading.",))]
    parts += [f"<p class='note'>{_escape(note)}</p>" for note in notes]
    return f"<div class='pg'>{''.join(parts)}</div>"


def _draw_bars(probs: np.ndarray) -> str:
    rows = []
    for name, color, share in zip(LABEL_NAMES, LABEL_COLORS, probs, strict=True):
        bar = f"<i style='width:{100 * share:.2f}%;background:{color}'></i>"
        rows.append(f"<div class='bar'><span>{name}</span>{bar}<b>{share:.1%}</b></div>")
    return "".join(rows)


def _show_exchanged(given: np.ndarray, exchanged: np.ndarray) -> str:
    head = ("", *LABEL_NAMES, "gap")
    gap = float(np.abs(given - exchanged).max())
    rows = [
        ("as given", *map(_percent, given), ""),
        ("exchanged, read back", *map(_percent, exchanged), f"{100 * gap:.1f} points"),
    ]
    return "<h4>The same with the answers exchanged</h4>" + _table(head, rows)


def _show_members(predictor: Predictor, answer: Answer) -> str:
    blend = predictor.source.blend
    weights = dict(zip(blend.members, blend.weights, strict=True))
    rows = []
    for name, probs in answer.members.items():
        gap = answer.swap_gaps.get(name, np.array([np.nan]))[0]
        shown = "none" if name in predictor.baselines else f"{100 * gap:.1f} points"
        rows.append(
            (_escape(predictor.name(name)), f"{weights[name]:.0%}", *map(_percent, probs[0]), shown)
        )
    head = ("", "weight", *LABEL_NAMES, "gap of one reading")
    return "<h4>What each model says</h4>" + _table(head, rows)


def _show_terms(terms: pd.Series) -> str:
    top = terms[terms.abs() >= 0.005].sort_values(key=np.abs, ascending=False)[:_N_TERMS]
    rows = ["<h4>Which style differences push which way</h4>"]
    for name, value in top.items():
        width = 100 * abs(value) / max(top.abs().max(), 0.3)
        side = "left" if value > 0 else "right"
        color = LABEL_COLORS[0 if value > 0 else 1]
        bar = f"<i class='{side}' style='width:{width:.1f}%;background:{color}'></i>"
        cells = (bar, "<span></span>") if value > 0 else ("<span></span>", bar)
        caption = f"<span>{escape(STYLE_FEATURES[str(name)])}</span>"
        rows.append(f"<div class='term'>{caption}{''.join(cells)}<b>{_signed(value)}</b></div>")
    about = (
        "Left is towards A, right towards B, in log-odds of A against B: "
        f"{_signed(terms.sum())} in all. These are the terms of the CPU baseline's style member; "
        "words count beside them."
    )
    about = "None that matters: the answers look alike." if top.empty else about
    return "".join([*rows, f"<p class='note'>{about}</p>"])


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _show_status(predictor: Predictor) -> str:
    names = [f"{name} ({predictor.name(name)})" for name in predictor.runs]
    text = f"Ready: {', '.join(names)}."
    if not predictor.is_ready:
        waiting = ", ".join(predictor.networks)
        text = f"Ready: the CPU baseline. Still loading: {waiting}."
        text = text if predictor.baselines else f"Loading {waiting} …"
    lost = [name for name in predictor.source.runs if name not in predictor.runs]
    if lost or predictor.source.absent:
        missing = ", ".join([*lost, *predictor.source.absent])
        text += f" Not there: {missing}; the others have its weight."
    if predictor.source.is_demo:
        text += " The model learned from a simulated arena: no opinion of a person is in it."
    return f"<div class='pg note' id='status'>{_escape(text)}</div>"


def _show_mistake(error: Exception) -> str:
    return f"<div class='pg'><p class='bad' role='alert'>{_escape(str(error))}</p></div>"


def _escape(text: Any) -> str:
    return escape(clean_text(str(text)))


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


# ---- serving ---------------------------------------------------------------------------------


class _Guard:
    """ASGI middleware: refuses long requests, and keeps browsers from asking other machines."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        n_bytes = headers.get(b"content-length", b"0")
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        if b"transfer-encoding" in headers and not is_upload:
            await _refuse(send, 411, "expected a content-length")
        elif not is_upload and int(n_bytes) > _MAX_BODY:
            await _refuse(send, 413, f"expected at most {_MAX_BODY:,} bytes in a request")
        else:
            await self.app(scope, receive, _with_policy(send))


async def _refuse(send: Any, code: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _with_policy(send: Any) -> Any:
    policy = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"content-security-policy", policy)]
        await send(message)

    return sending


def show(model: str | Path = "", *, revision: str = "", **options: Any) -> gr.Blocks:
    """Open the playground from a notebook, below the cell; returns the page, to `close()` it.

    Args:
        model: an artifacts folder, a run folder, a published folder or a hub id; empty takes
            `artifacts/`.
        revision: commit of a hub id.
        options: of gradio's `launch`, e.g. server_name="0.0.0.0" to be seen from outside.
    """
    predictor = Predictor(model or paths.artifacts_dir(), revision)
    page = make_page(predictor)
    threading.Thread(target=_load_networks, args=(predictor,), daemon=True).start()
    fonts = ["system-ui", "sans-serif"]
    look = {"theme": gr.themes.Default(font=fonts, font_mono=["monospace"]), "css": _CSS}
    guard = {"middleware": [_middleware()]}
    chosen: dict[str, Any] = {
        "server_name": "127.0.0.1",
        "share": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "max_file_size": MAX_FILE_MB * 10**6,
        "state_session_capacity": 64,  # the oldest begins anew; a session takes half a MiB
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "app_kwargs": guard,
        **look,
    }
    page.launch(**(chosen | options))
    return page


def _middleware() -> Any:
    from starlette.middleware import Middleware  # comes with gradio

    return Middleware(_Guard)


def _load_networks(predictor: Predictor) -> None:
    try:
        predictor.load_networks(ask_all=True)
    except RuntimeError as error:
        print(f"warning: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(description="Serve a page to try a model.")
    parser.add_argument("--model", default="", help="folder or hub id; default: artifacts/")
    parser.add_argument("--revision", default="", help="commit of a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="default: 7860, or the next free one")
    given = parser.parse_args(argv)
    start = time.monotonic()
    try:
        page = show(
            given.model, revision=given.revision, server_name=given.host, server_port=given.port
        )
    except _MISTAKES as error:
        print(f"playground: {error}", file=sys.stderr)
        return 1
    print(f"Open {page.local_url} ({time.monotonic() - start:.1f} s); Ctrl-C ends it.", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
