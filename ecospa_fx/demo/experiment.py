"""Experiment of the demo: three runs, from text to table.

corpus -> train x 3 (dense | EcoSpa | uncoupled) -> save and reload -> time side by side -> table, plot, JSON, CSV
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import ecospa_fx
from ecospa_fx.see.watch import importance_range

from .ablation import break_pairing
from .corpus import Corpus, read_corpus, validation_batches
from .options import Options
from .plot import save_plot
from .reload import reload_in_new_process, save_check
from .report import rows_of, table_of, write_results
from .timing import step_time_ratios
from .train import Run, start_run, train

RECENT = 20
"""Number of steps over which the progress line averages."""


def run_experiment(options: Options, console: Console | None = None) -> int:
    """Run the whole demo and write its results to `options.out`.

    Returns:
        Exit code: 0, or 1 if the model loaded in a new process returns other logits than before.

    Raises:
        OptionError: the text or the architecture cannot be used; nothing has been written then.
    """
    console = console or Console()
    began = time.perf_counter()
    corpus = read_corpus(options.text, least=20 * options.batch_size * (options.context + 1))
    runs = [start_run("dense", options)]
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{options.arch}, {sum(p.numel() for p in runs[0].model.parameters()):,} parameters, random weights; "
        f"{corpus.source}: {len(corpus.train):,} bytes to learn from, {len(corpus.valid):,} held out"
    )
    with _progress(console) as progress:
        _train(runs[0], corpus, options, progress)
        runs.append(start_run("EcoSpa", options))
        _train(runs[1], corpus, options, progress)
        runs.append(start_run("uncoupled", options, before_shrink=break_pairing))
        _train(runs[2], corpus, options, progress)

    equal, result = _save_and_reload(runs[1], corpus, options)
    ratios = step_time_ratios(runs, corpus, options)
    rows = rows_of(runs, ratios)
    write_results(options.out, rows, runs, options, corpus)
    save_plot(runs, options.out / "curves.png", f"{options.arch} on {corpus.source}, target {options.target:g}")
    console.print(table_of(rows))
    console.print(f"shrunk model saved, and loaded again in a new process: {result}")
    console.print(
        f"{options.out}: results.json, results.csv, curves.png, model/; took {time.perf_counter() - began:.0f} s"
    )
    return 0 if equal else 1


def _train(run: Run, corpus: Corpus, options: Options, progress: Progress) -> None:
    bar = progress.add_task(run.name, total=options.steps, shown="")
    for step in train(run, corpus, options):
        loss = sum(run.losses[-RECENT:]) / len(run.losses[-RECENT:])
        recent = 1e3 * sum(run.seconds[-RECENT:]) / len(run.seconds[-RECENT:])
        importance = "" if run.trainer is None else importance_range(run.trainer)
        shown = f"loss {loss:.3f}  {run.sizes[-1]:>9,} parameters  {recent:3.0f} ms{importance}"
        progress.update(bar, completed=step, shown=shown)
    progress.console.print(
        f"{run.name}: {run.sizes[-1]:,} parameters, validation loss {run.final_loss:.3f} nats per byte, "
        f"{len(run.shrinks)} shrinks, {sum(run.seconds):.0f} s of steps"
    )


def _save_and_reload(run: Run, corpus: Corpus, options: Options) -> tuple[bool, str]:
    directory = options.out / "model"
    ecospa_fx.save(run.model, directory, optimizer=run.optimizer, trainer=run.trainer)
    tokens, _ = next(validation_batches(corpus, 1, options.batch_size, options.context))
    save_check(run.model, tokens, directory)
    return reload_in_new_process(directory)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
    )
