"""Draw README's battle card: `python -m docs.card`, or `make gallery`, which does it at its end.

The battle is our own. What a model says of it comes from the CPU baseline of a finished run,
trained on real votes where there are some.
"""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageChops

from docs.pages import compress
from src.utils.models.baseline import load_baseline
from src.utils.paths import ROOT, artifacts_dir
from src.utils.runs import read_json
from src.utils.stats.cards import show_battle

PICTURE = ROOT / "assets" / "battle_card.png"
BATTLE = {
    "id": "1",
    "prompt": ("How do I stop my sourdough bread from coming out flat?",),
    "response_a": (
        "Flat sourdough is usually underproofed or has lost its tension. Try this:\n\n"
        "1. Check the starter: it should double within 4 to 6 hours of feeding.\n"
        "2. Let the dough rise by half to three quarters of its volume.\n"
        "3. Shape it twice, pulling the surface tight.\n"
        "4. Bake in a covered pot at 240 °C, so that steam keeps the crust soft while it rises.",
    ),
    "response_b": (
        "I'm sorry to hear that! Baking can be tricky. It could be the starter, the flour or the "
        "oven. I would recommend asking a baker.",
    ),
    "model_a": "chatbot 1",
    "model_b": "chatbot 2",
}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SIZE = (800, 1000)  # CSS pixels, more than the card needs: the rest is cut off


def find_run() -> Path | None:
    """Find a finished CPU baseline, of real battles rather than of the demo arena."""
    runs = [folder / "02_baseline" for folder in (artifacts_dir() / "real", artifacts_dir())]
    return next((run for run in runs if (run / "metrics.json").exists()), None)


def predict_card(run: Path) -> np.ndarray:
    """Predict the card's battle: (C,) float."""
    return load_baseline(run / "model").predict_probs(pd.DataFrame([BATTLE]))[0]


def draw_card() -> bool:
    """Draw the card, unless no browser or no finished run is found; return whether it was."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    run = find_run()
    if not browser or not run:
        print(f"{PICTURE.name} stays as it is: it takes a finished run, and one of {_BROWSERS}")
        return False
    n_pairs = read_json(run / "metrics.json")["n_pairs"]
    votes = f"{n_pairs:,} {'real' if run.parent.name == 'real' else 'simulated'} votes"
    title = f"How will people vote? The CPU baseline, after {votes}"
    card = show_battle(pd.Series(BATTLE), predict_card(run), title).data
    look = "font:17px/1.4 system-ui,sans-serif;margin:12px;background:white"
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "card.html", Path(folder) / "card.png"
        page.write_text(f"<meta charset='utf-8'><body style='{look}'>{card}", encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--window-size={_SIZE[0]},{_SIZE[1]}", "--force-device-scale-factor=2"]
        command += [f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        PICTURE.write_bytes(compress(_trim(picture.read_bytes())))
    return True


def _trim(png: bytes) -> bytes:
    """Cut off the white around a picture, but for a margin."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    written = io.BytesIO()
    image.crop((0, 0, image.width, min(box[3] + 24, image.height))).save(written, format="PNG")
    return written.getvalue()


if __name__ == "__main__":
    draw_card()
