"""A page to try a model: paste a prompt and two answers, or score a file of battles.

It listens on this machine only, unless told otherwise, and asks nothing of any other. Every text
that people type, upload or draw is shown as text. No state is shared between visitors.
"""

import argparse
import functools
import gzip
import inspect
import os
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# Before the import, which would ask for the newest version otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="playground-"))
# It writes type stubs of its components while it is imported, half of that time, unless it cannot
# find their source.
with mock.patch.object(inspect, "getfile", side_effect=OSError):
    import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from src.utils import paths
from src.utils.battles.readers import iter_battles
from src.utils.battles.style import STYLE_FEATURES
from src.utils.delivery.predictor import MISTAKES, Answer, Predictor
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
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
_N_ROWS = 200  # of a file at once; visitors with a single battle wait no longer than for these
_N_DRAWN = 500  # battles that the button draws from
_N_TERMS = 8  # style differences that are shown
_KEEP_S = 3600  # files of visitors

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
.pg table {{ width: 100%; border-collapse: collapse; margin: 0 !important; }}
.pg th, .pg td {{ border: 0 !important; border-bottom: 1px solid #8883 !important;
  padding: 4px 0 4px 10px; text-align: right; font-weight: normal; }}
.pg tbody th {{ text-align: left; padding-left: 0; }}
.pg .bar {{ display: grid; grid-template-columns: minmax(5em, min(34%, 15em)) 1fr 4em;
  align-items: center; gap: 8px; margin: 4px 0; line-height: 1.25; }}
.pg .bar i {{ display: block; height: 16px; border-radius: 3px; min-width: 1px; }}
.pg b {{ text-align: right; }}
.pg .note {{ opacity: .75; font-size: .9em; overflow-wrap: anywhere; }}
.pg .bad {{ border-left: 4px solid {LABEL_COLORS[1]}; padding: 6px 10px; overflow-wrap: anywhere; }}
#actions button {{ font-size: 1rem; white-space: nowrap; }}
footer {{ display: none !important; }}
@media (max-width: 500px) {{
  .pg table, #actions button {{ font-size: .8rem; }}
  .pg th, .pg td {{ padding-left: 5px; }}
}}
"""


def make_page(predictor: Predictor) -> gr.Blocks:
    """Build the page for a model that is loaded, or whose networks are still being loaded."""
    drawer = _Drawer(predictor)
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
            _add_file_tab(predictor)

        def battle(
            prompt: list[str], response_a: list[str], response_b: list[str]
        ) -> dict[str, float]:
            """Predict one battle; a text is the list of its turns."""
            try:
                pairs = make_battle([prompt, response_a, response_b])
                probs = predictor.predict(pairs).probs[0]
            except MISTAKES as error:
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
            values[place : 3 * len(turns) : 3] = map(clean_text, turns)
        return [n, note, *(gr.Group(visible=turn < n) for turn in range(MAX_TURNS)), *values]

    def read(n: int, values: Sequence[str]) -> list[list[str]]:
        return [list(values[place : 3 * n : 3]) for place in range(3)]

    def predict(n: int, note: str, *values: str) -> str:
        try:
            return note + show_prediction(predictor, make_battle(read(n, values)))
        except MISTAKES as error:
            return _show_mistake(error)

    def exchange(n: int, note: str, *values: str) -> list[Any]:
        prompt, a, b = read(n, values)
        return fill([prompt, b, a])

    def add_turn(n: int, note: str, *values: str) -> list[Any]:
        return fill(read(min(n + 1, MAX_TURNS), values))

    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    given = [n_turns, drawn, *boxes]
    answer: dict[str, Any] = {"fn": predict, "inputs": given, "outputs": result} | options
    go.click(**answer)
    swap.click(exchange, given, shown, **options).then(**answer)
    draw.click(lambda: fill(*drawer.draw()), None, shown, **options).then(**answer)
    more.click(add_turn, given, shown, **options)
    clear.click(lambda: [*fill([[""]] * 3), ""], None, [*shown, result], **options)
    for button, texts in zip(samples, EXAMPLES, strict=True):
        example = functools.partial(fill, [[text] for text in texts])
        button.click(example, None, shown, **options).then(**answer)


def _add_file_tab(predictor: Predictor) -> None:
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
        except MISTAKES as error:
            return _show_mistake(error), gr.File(visible=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "probabilities.csv")
            table.to_csv(file, index=False)
            kept = download.move_resource_to_block_cache(file)  # for `_KEEP_S`
        return text, gr.File(kept, visible=True)

    go.click(score, upload, [result, download], api_name="score", concurrency_limit=1)


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
        n_chars += _count_chars(turns)
    _check_length(n_chars, "the battle")
    row = {name: [tuple(turns)] for name, turns in zip(TEXTS, texts, strict=True)}
    return pd.DataFrame({"id": ["1"], **row})


def _count_chars(turns: Sequence[str | None]) -> int:
    return sum(len(turn or "") for turn in turns)


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
        n_chars = chunk.pairs[list(TEXTS)].map(_count_chars).sum(axis=1)
        for name, n in zip(chunk.pairs["id"], n_chars, strict=True):
            _check_length(n, f"{path.name}, id {name}")
        answer = predictor.predict(chunk.pairs)
        parts.append(pd.DataFrame(answer.probs, columns=list(LABELS)))
        parts[-1].insert(0, "id", chunk.pairs["id"])
        notes |= dict.fromkeys(answer.notes)
        notes |= {f"odd cell: {', '.join(map(str, odd.values()))}": None for odd in chunk.problems}
        left_s = (time.monotonic() - start) * (1 / max(chunk.share, 1e-3) - 1)
        progress(chunk.share, desc=f"{n_rows:,} battles, {left_s:.0f} s left")
    table = pd.concat(parts, ignore_index=True)
    parts_shown = [f"<p>{len(table):,} battles in {time.monotonic() - start:.1f} s.</p>"]
    if len(table):
        parts_shown += ["<p>On average:</p>", _draw_probs(table[list(LABELS)].mean())]
    return table, _wrap(*parts_shown, *map(_show_note, list(notes)[:20]))


def _check_size(path: Path) -> None:
    if not path.name.lower().endswith(paths.TABLE_SUFFIXES):
        raise ValueError(f"{path.name}: expected one of {', '.join(paths.TABLE_SUFFIXES)}")
    sizes = {f"{MAX_FILE_MB} MB": (path.stat().st_size, MAX_FILE_MB)}
    sizes[f"{MAX_UNPACKED_MB} MB unpacked"] = (_measure_unpacked(path), MAX_UNPACKED_MB)
    for expected, (n_bytes, limit) in sizes.items():
        if n_bytes > limit * 10**6:
            raise ValueError(f"{path.name}: expected at most {expected}, got {n_bytes / 1e6:.0f}")


def _measure_unpacked(path: Path) -> int:
    """Bytes, of packed text up to a little more than what is allowed."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:
                return file.seek(MAX_UNPACKED_MB * 10**6 + 1)
        if path.suffix.lower() == ".parquet":
            metadata = pq.read_metadata(path)
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            return sum(group.total_byte_size for group in groups)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"{path.name}: expected a readable file, got {error}") from error
    return 0


class _Drawer:
    """Draws battles from the data of a model, with what people voted."""

    def __init__(self, predictor: Predictor) -> None:
        artifacts = predictor.source.artifacts
        self._folder = artifacts / "01_eda" if artifacts else Path()
        self.has_battles = (self._folder / "pairs.parquet").exists()

    def draw(self) -> tuple[list[list[str]], str]:
        """Draw a battle: the turns of its texts, and a line of HTML about the vote."""
        battle = self._battles.sample().iloc[0]
        texts = [[turn or "" for turn in battle[name]] for name in TEXTS]
        known = f"People voted: {LABEL_NAMES[int(battle['label'])]}"
        if "model_a" in battle.index:
            known += f" (A is {battle['model_a']}, B is {battle['model_b']})"
        return texts, _wrap(_show_note(f"{known}. {battle['origin']}"))

    @functools.cached_property
    def _battles(self) -> pd.DataFrame:
        votes = self._folder / "arena" / "votes_test.parquet"
        if votes.exists():
            battles = next(iter_battles(self._folder / "arena" / "test.csv", _N_DRAWN)).pairs
            battles = battles.merge(pd.read_parquet(votes).astype({"id": str}), on="id")
            origin = "A simulated battle that the model has not seen."
        else:
            battles = read_pairs(self._folder / "pairs.parquet")
            battles = battles.sample(min(len(battles), _N_DRAWN), random_state=0)
            origin = "The model has learned from this battle, so it knows more than it should."
        texts = battles[list(TEXTS)]
        is_short = texts.map(_count_chars).sum(axis=1) <= MAX_CHARS
        is_short &= texts.map(len).max(axis=1) <= MAX_TURNS
        return battles[is_short].assign(origin=origin)


# ---- what is shown ---------------------------------------------------------------------------


def show_prediction(predictor: Predictor, pairs: pd.DataFrame) -> str:
    """Predict one battle as it is and with its answers exchanged: HTML."""
    both = pd.concat([pairs, swap_pairs(pairs)], ignore_index=True)
    answer = predictor.predict(both, ask_all=True)
    given, exchanged = answer.probs[0], swap_probs(answer.probs[1])
    table = pd.DataFrame([given, exchanged], ["as given", "exchanged, read back"], LABEL_NAMES)
    table["gap"] = ["", _points(np.abs(given - exchanged).max())]
    parts = [_draw_probs(given), _show_table("The same with the answers exchanged", table)]
    parts.append(_show_table("What each model says", _list_members(predictor, answer)))
    if predictor.baseline:
        terms = predictor.baseline.style_terms(pairs).iloc[0]
        if len(pairs["prompt"].iloc[0]) == 1:  # its first and last turn are the prompt
            terms["prompt_overlap"] += terms.pop("prompt_overlap_first")
            terms["prompt_overlap"] += terms.pop("prompt_overlap_last")
        parts.append(_show_terms(terms))
    notes = [*answer.notes, *(() if predictor.is_ready else ("The networks are still loading.",))]
    return _wrap(*parts, *map(_show_note, notes))


def _list_members(predictor: Predictor, answer: Answer) -> pd.DataFrame:
    names = [predictor.name(name) for name in answer.members]
    first = [probs[0] for probs in answer.members.values()]
    table = pd.DataFrame(first, names, LABEL_NAMES)
    weights = dict(zip(predictor.source.blend.members, predictor.source.blend.weights, strict=True))
    table.insert(0, "weight", [f"{weights[name]:.0%}" for name in answer.members])
    gaps = [answer.swap_gaps.get(name) for name in answer.members]
    table["gap of one reading"] = ["none" if gap is None else _points(gap[0]) for gap in gaps]
    return table


def _show_terms(terms: pd.Series) -> str:
    top = terms[terms.abs() >= 0.005].sort_values(key=np.abs, ascending=False)[:_N_TERMS]
    parts = ["<h4>Which style differences push which way</h4>"]
    for name, value in top.items():
        end = 0.5 - value / max(top.abs().max(), 0.3) / 2
        color = LABEL_COLORS[0 if value > 0 else 1]
        caption = STYLE_FEATURES[str(name)]
        parts.append(_draw_bar(caption, sorted((0.5, end)), color, _signed(value)))
    about = (
        "Left is towards A, right towards B, in log-odds of A against B: "
        f"{_signed(terms.sum())} in all. These are the terms of the CPU baseline's style member; "
        "words count beside them."
    )
    about = "None that matters: the answers look alike." if top.empty else about
    return "".join([*parts, _show_note(about)])


def _draw_probs(probs: Sequence[float] | np.ndarray | pd.Series) -> str:
    bars = []
    for name, color, share in zip(LABEL_NAMES, LABEL_COLORS, probs, strict=True):
        bars.append(_draw_bar(name, (0, share), color, f"{share:.1%}"))
    return "".join(bars)


def _draw_bar(name: str, span: Sequence[float], color: str, value: str) -> str:
    """A bar from one share of the width to another, with its name and value."""
    look = f"margin-left:{span[0]:.2%};width:{span[1] - span[0]:.2%};background:{color}"
    return f"<div class='bar'><span>{escape(name)}</span><i style='{look}'></i><b>{value}</b></div>"


def _show_table(title: str, table: pd.DataFrame) -> str:
    shown = table.to_html(float_format="{:.1%}".format, na_rep="–", border=0)
    return f"<h4>{title}</h4>{shown}"


def _points(gap: float) -> str:
    return f"{100 * gap:.1f} points"


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
    return _wrap(f"<div id='status'>{_show_note(text)}</div>")


def _show_mistake(error: Exception) -> str:
    return _wrap(f"<p class='bad' role='alert'>{escape(clean_text(str(error)))}</p>")


def _show_note(text: str) -> str:
    return f"<p class='note'>{escape(clean_text(text))}</p>"


def _wrap(*parts: str) -> str:
    return f"<div class='pg'>{''.join(parts)}</div>"


# ---- serving ---------------------------------------------------------------------------------


class _Guard:
    """ASGI middleware: refuses long requests, and keeps browsers from asking other machines."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = _POLICY
            await send(message)

        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        is_upload = scope.get("path", "").rstrip("/").endswith("/upload")
        app = self.app
        if "transfer-encoding" in headers and not is_upload:
            app = PlainTextResponse("expected a content-length", 411)
        elif int(headers.get("content-length", 0)) > _MAX_BODY and not is_upload:
            app = PlainTextResponse(f"expected at most {_MAX_BODY:,} bytes in a request", 413)
        await app(scope, receive, sending)


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
        "app_kwargs": {"middleware": [Middleware(_Guard)]},
        "theme": gr.themes.Default(font=fonts, font_mono=["monospace"]),
        "css": _CSS,
    }
    page.launch(**(chosen | options))
    return page


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
    except MISTAKES as error:
        print(f"playground: {error}", file=sys.stderr)
        return 1
    print(f"Open {page.local_url} ({time.monotonic() - start:.1f} s); Ctrl-C ends it.", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
