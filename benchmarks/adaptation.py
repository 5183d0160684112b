"""Adapting, scoring and differentiating users, and finding the best of a catalogue: each beside what does the same, in one run, by turns.

The plain model is `Mamo.forward` with autograd on the same batch: the same numbers, and what the engines are tested against. For gradient
steps there are also a loop over users, as published and as one would write it with care, and ``torch.func``. Bare is what cannot be
avoided, on operands that are at hand: the batched products of gradient steps, the products and the solve of the closed form.
Users are made up, of the demo's features, and rate items drawn by a power law; the work does not depend on what they like.

    make bench
    .venv/bin/python -m benchmarks.adaptation --seconds 20
    .venv/bin/python -m benchmarks.adaptation --catalogue 10000000
"""

from __future__ import annotations

import itertools
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  loads the BLAS that is limited below
import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from threadpoolctl import ThreadpoolController

from benchmarks.gradient_peers import bare, by_lean_loop, by_loop, by_vmap
from benchmarks.measuring import in_a_row, keep_memory, machine, rates, ratios, spread, timed
from benchmarks.performance import save
from consumers.demo_files import SETTINGS as DEMO
from consumers.histories import history_of_encoded
from model.catalogue import Catalogue
from model.history import History
from model.mamo import Mamo
from model.meta import Optimiser, adapt, differentiate, predict
from model.settings import PRESETS, FeatureSchema, ModelSettings
from model.tasks import Task
from streaming.codec import encode
from streaming.events import Support

RESULTS = Path("benchmarks/results/adaptation.json")
LARGE = Path("benchmarks/results/large-catalogue.json")
ITEMS = 2_000
CATALOGUE = 100_000
SHAPE = 1.1
"""Of the power law by which items are drawn."""
BEST = 10

console = Console()


class Work(NamedTuple):
    """So many users, each with a support and a query of these sizes."""

    name: str
    users: int
    support: int
    query: int
    learning: bool
    threads: int = 1
    size: int = 0
    """d_e under `paper`; 0 is `default`, at its own."""
    steps: int = 0
    ids: Literal["encoded", "texts", "places"] = "encoded"
    """How the ids of supports are given: in encoded support sets, as a worker reads them; as Python's texts; or looked up before, as a
    worker keeps them for users whom it has rehearsed."""


WORKS = [
    Work("default: adapt and score, support 50, 256 users", 256, 50, 1, learning=False),
    Work("default: the same, ids as texts of Python's", 256, 50, 1, learning=False, ids="texts"),
    Work("default: the same, ids looked up before", 256, 50, 1, learning=False, ids="places"),
    Work("default: adapt and score, support 50, 16 users", 16, 50, 1, learning=False),
    Work("default: meta-update, support 50, 10 queries, 64 users", 64, 50, 10, learning=True),
    Work("default: meta-update, support 100, 1 query, 512 users", 512, 100, 1, learning=True),
    Work("paper: d_e 100, support 15, 9 steps, 64 users", 64, 15, 1, learning=False, threads=2, size=100, steps=9),
    Work("paper: d_e 32, support 20, 3 steps, 256 users", 256, 20, 1, learning=False, size=32, steps=3),
    Work("paper: the same, two cores", 256, 20, 1, learning=False, threads=2, size=32, steps=3),
    Work("paper: meta-update, d_e 32, support 20, 3 steps, 64 users", 64, 20, 10, learning=True, threads=2, size=32, steps=3),
]


def tasks(work: Work, rng: np.random.Generator) -> list[Task]:
    """One task for each user, in which no item comes twice."""
    weights = np.arange(1, ITEMS + 1) ** -SHAPE
    made = []
    for user in range(work.users):
        drawn = rng.choice(ITEMS, work.support + work.query, replace=False, p=weights / weights.sum())
        ratings = rng.integers(1, 6, len(drawn)).astype(float).tolist()
        items = [f"i{item}" for item in drawn]
        n, support = work.support, (items[: work.support], ratings[: work.support])
        if work.ids == "encoded":
            interactions = [(item, rating, place) for place, (item, rating) in enumerate(zip(*support, strict=True))]
            read = history_of_encoded(encode(Support(interactions, ("interactions", 0, n), n, user)))
            made.append(Task(f"u{user}", read.items, read.ratings, items[n:], ratings[n:]))
        else:
            made.append(Task(f"u{user}", *support, items[n:], ratings[n:], History.of(items, ratings) if work.ids == "places" else None))
    return made


def model(*, plain: bool, size: int = 0, steps: int = 0, items: int = ITEMS) -> Mamo:
    """The model of a preset with the demo's features and profiles for everybody."""
    schema = FeatureSchema(**tomllib.loads(DEMO.read_text())["schema"])
    over = PRESETS["paper"]["model"] | {"embedding_size": size, "inner_steps": steps} if size else {}
    # Room for what the features' values take beside the ids.
    over |= {"max_rows": items + 1000, "max_profiles": items + 1000} if items > CATALOGUE else {}
    made, rng = Mamo(ModelSettings(**over), schema, (1.0, 5.0)), np.random.default_rng(1)
    made.plain = plain
    genres = [f"genre{number}" for number in range(18)]
    profiles: list[dict[str, Any]] = []
    for item in range(items):
        if item < CATALOGUE:
            classes = [str(genre) for genre in rng.choice(genres, rng.integers(1, 4), replace=False)]
            profiles.append({"class": classes, "release_year": float(rng.integers(1930, 1999))})
        made.items.set(f"i{item}", profiles[item % CATALOGUE])
    for user in range(max(work.users for work in WORKS)):
        job = f"job{rng.integers(21)}"
        made.users.set(f"u{user}", {"age": float(rng.integers(15, 70)), "gender": "FM"[rng.integers(2)], "occupation": job})
    return made


def once(of: Mamo, optimiser: Optimiser, work: Work, batch: list[Task]) -> None:
    """The work, from ids to scores, or to a model that has learned."""
    if not work.learning:
        predict(of, batch)
        return
    (gradient,), writing = differentiate(of, adapt(of, batch, learning=True), {task.user for task in batch})
    optimiser.step(gradient, writing.composed())


def measure(work: Work, seconds: float) -> dict[str, Any]:
    """The engine beside its peers."""
    torch.set_num_threads(work.threads)
    batches = [tasks(work, np.random.default_rng(seed)) for seed in range(8)]
    models = {name: model(plain=name == "plain", size=work.size, steps=work.steps) for name in ("engine", "plain")}

    def calls(of: Mamo) -> Callable[[], None]:
        # Tasks of its own: what histories keep holds for one model.
        own = [tasks(work, np.random.default_rng(seed)) for seed in range(len(batches))]
        turn, optimiser = itertools.cycle(own), Optimiser(of)
        return lambda: once(of, optimiser, work, next(turn))

    ways: dict[str, Callable[[], object]] = {name: calls(of) for name, of in models.items()}
    products = 0.0
    if not work.size and not work.learning:
        ways["bare"], products = bare_solve(work.users, work.support, models["engine"].settings.embedding_size + 1)
    if work.size and not work.learning:
        of = models["engine"]
        scores = predict(of, batches[0]).score
        for peer in (by_loop, by_lean_loop, by_vmap):
            # A unit at the very edge of its activation may fall to either side, and changes that user's scores: few do.
            apart = (peer(of, batches[0]).clamp(1.0, 5.0) - scores).abs() > 1e-4
            if apart.float().mean() >= 0.05:
                raise RuntimeError(f"{peer.__name__} finds other scores than the engine, so that their times say nothing")
        ways |= {
            "loop": lambda: by_loop(of, batches[0]),
            "lean loop": lambda: by_lean_loop(of, batches[0]),
            "vmap": lambda: by_vmap(of, batches[0]),
        }
        ways["bare"], products = bare(work.users, work.support, work.size, work.steps)
    took = timed(ways, seconds)
    return work._asdict() | {
        "kind": "adaptation",
        "users_per_second": rates(took, work.users),
        "in_a_row": rates(in_a_row({name: ways[name] for name in ("engine", "plain", "bare") if name in ways}, seconds / 4), work.users),
        "ratios": ratios(took, "engine"),
        "products_flop": products,
        "seconds": took,
    }


def bare_solve(users: int, support: int, size: int) -> tuple[Callable[[], object], float]:
    """The closed form of users whose ``size`` features of each item, ratings and precisions are at hand, as torch has it, and its FLOP."""
    x, n, y, query = (torch.rand(users, *shape) for shape in ((support, size), (support, 1), (support, 1), (size, 1)))
    prior = 4 * torch.eye(size)

    def solve() -> object:
        weighted = (n * x).mT
        root = torch.linalg.cholesky(weighted @ x + prior)
        both = torch.cholesky_solve(torch.cat([weighted @ y, query], 2), root)
        return query.mT @ both

    return solve, users * (2.0 * support * size * (size + 1) + size**3 / 3 + 4 * 2 * size**2)


def best(size: int, seconds: float, catalogue: int = CATALOGUE) -> Iterator[dict[str, Any]]:
    """The best of a catalogue for adapted users: one user, and 64 together; ``size`` as in `Work`, resident memory in bytes."""
    torch.set_num_threads(1)
    work = Work("", 64, 15 if size else 50, 0, learning=False)
    of = model(plain=False, size=size, steps=3, items=catalogue)
    drawn = 0.2 * np.random.default_rng(2).standard_normal((catalogue, of.item_table.width), np.float32)
    of.item_table.assign([f"id=i{item}" for item in range(catalogue)], torch.from_numpy(drawn))
    asked, items = tasks(work, np.random.default_rng(0)), Catalogue(of)
    wanted = BEST + work.support

    def after_a_version() -> None:
        of.set_vector(of.vector.clone())
        items.candidates(asked[:1], [wanted])

    new = itertools.count()

    def after_a_profile() -> None:
        of.items.set(f"new{next(new)}", {"release_year": 1990.0})
        items.candidates(asked[:1], [wanted])

    for users in (1, 64) if not size else (1, 4):
        few = asked[:users]
        queries = [task._replace(query_items=["i0"], query_ratings=[0.0]) for task in few]
        ways: dict[str, Callable[[], object]] = {
            "adapt": partial(predict, of, queries),
            "adapt and choose": partial(items.candidates, few, [wanted] * len(few)),
        }
        if users == 1:
            ways["after a new version"] = after_a_version
            ways["after a new profile"] = after_a_profile
        if catalogue == CATALOGUE:
            ways["bare products"] = products_of(of, size, users)
        before = resident()
        # Where users are taken one by one, each takes seconds; the case of one user has warmed up for the others.
        took = once_each(ways) if users > 1 and catalogue != CATALOGUE else timed(ways, seconds, least=5 if catalogue == CATALOGUE else 1)
        name = f"{'paper, d_e ' + str(size) if size else 'default'}: best {BEST} of {catalogue:,}, {users} user{'s' if users > 1 else ''}"
        memory = {"before": before, "peak": resident("VmHWM")}
        yield {"kind": "catalogue", "name": name, "users": users, "threads": 1, "size": size, "seconds": took, "resident": memory}


def once_each(ways: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of one call of each."""
    took = dict[str, list[float]]()
    for name, call in ways.items():
        began = time.perf_counter()
        call()
        took[name] = [time.perf_counter() - began]
    return took


def resident(which: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Bytes resident now, from where on the peak, ``VmHWM``, is counted anew."""
    if which == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(which))


def products_of(of: Mamo, size: int, users: int) -> Callable[[], object]:
    """The products that scoring a catalogue cannot do without, on operands made before: see `model.catalogue`."""
    block = 16_384
    if not size:
        table, own = torch.randn(CATALOGUE, of.settings.embedding_size + 2), torch.randn(users, of.settings.embedding_size + 2)
        out = torch.empty(users, CATALOGUE)
        return lambda: torch.mm(own, table.T, out=out)
    wide = of.shapes["item.0.weight"][0]
    p_i, rows, by = torch.randn(block, wide), torch.randn(15, wide), torch.randn(15, size)
    start, square, last = torch.randn(block, size), torch.randn(size, size), torch.randn(size, 1)

    def multiply() -> None:
        for _ in range(users):
            for begin in range(0, CATALOGUE, block):
                n = min(block, CATALOGUE - begin)
                torch.mm(torch.mm(torch.addmm(start[:n], torch.mm(p_i[:n], rows.T), by), square), last)

    return multiply


def main(
    seconds: Annotated[float, typer.Option(help="For each work.", min=1)] = 20.0,
    results: Annotated[Path | None, typer.Option(help=f"Where the figures go: {RESULTS}, or {LARGE}.", dir_okay=False)] = None,
    catalogue: Annotated[int | None, typer.Option(help="Only the best of so many items, closed form.", min=1)] = None,
) -> None:
    """Measure users a second, the median of all repetitions; ratios are medians over turns."""
    keep_memory()
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)  # As in a worker. What peers multiply by is torch's own.
    if catalogue is not None:
        runs = []
        for run in best(0, 1.0, catalogue):
            runs.append(run)
            shown = ", ".join(f"{name} {1e3 * float(np.median(took)) / run['users']:,.1f}" for name, took in run["seconds"].items())
            memory = ", ".join(f"{moment} {size / 1e6:,.0f}" for moment, size in run["resident"].items())
            console.print(f"{run['name']}: ms a user: {shown}; resident MB: {memory}", highlight=False)
        save(results or LARGE, machine(), runs)
        console.print(f"figures: {results or LARGE}")
        return
    peers = ("plain", "loop", "lean loop", "vmap", "bare")
    table = Table("", "users/s", "in a row", *peers, title="The engine, and how many times as long its peers take", box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    runs = []
    for work in WORKS:
        name = f"{work.name}{f', {work.threads} threads' if work.threads > 1 else ''}"
        console.print(f"{name} ...", highlight=False)
        run = measure(work, seconds)
        runs.append(run)
        rate, row, ratio = f"{run['users_per_second']['engine']:,.0f}", f"{run['in_a_row']['engine']:,.0f}", run["ratios"]
        apart = spread(run["seconds"]["engine"], work.users)
        beside = ", ".join(f"{peer} {ratio[peer]:.2f}" for peer in peers if peer in ratio)
        console.print(f"    {rate} users/s ({apart}), in a row {row}; times as long: {beside}", highlight=False)
        table.add_row(name, rate, row, *(f"{ratio[peer]:.2f}" if peer in ratio else "" for peer in peers))
    console.print(table)
    table = Table("", "ms a user", title=f"The best of {CATALOGUE:,}, one core")
    for size in (0, 32):
        console.print(f"the best of {CATALOGUE:,} items, {'d_e ' + str(size) + ', gradient steps' if size else 'closed form'} ...")
        for run in best(size, seconds):
            runs.append(run)
            each = {name: 1e3 * float(np.median(took)) / run["users"] for name, took in run["seconds"].items()}
            table.add_row(run["name"], ", ".join(f"{name} {ms:.2f}" for name, ms in each.items()))
    console.print(table)
    save(results or RESULTS, machine(), runs)
    console.print(f"figures: {results or RESULTS}")


if __name__ == "__main__":
    typer.run(main)
