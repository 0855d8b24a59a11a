"""The page of benchmarks/scaling.py: the measurements, the simulator against them, and what it says of more workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.quality import markdown_table
from benchmarks.simulation import Task, Work, simulate, work_of

MACHINE = 16
"""Cores of one machine, where more workers are simulated than it has."""
SIMULATED = (8, 64)
POLICIES = ("rtn", "sq", "rwkvquant")
DEMO = {"rwkv7-9m": (6, 256), "rwkv6-10m": (6, 256), "rwkv7-26m": (10, 384)}
FOURTEEN = {"14B": (61, 4096)}
RELEASED = {
    "rwkv7-0.1B": (12, 768),
    "rwkv7-0.4B": (24, 1024),
    "rwkv7-1.5B": (24, 2048),
    "rwkv7-2.9B": (32, 2560),
    "rwkv7-7.2B": (32, 4096),
    "rwkv7-13.3B": (61, 4096),
    "rwkv6-1.6B": (24, 2048),
    "rwkv6-3B": (32, 2560),
    "rwkv6-7B": (32, 4096),
    "rwkv6-14B": (61, 4096),
}
"""(layers, width) of each model."""
RELEASED_VOCAB = 65536


@dataclass(frozen=True)
class Costs:
    """Measured one-core seconds of the demo model's tasks, and its size: they grow with the weights of the model."""

    blocks: Mapping[str, float]
    """Seconds of the mean block by policy."""
    stages: Mapping[str, float]
    layers: int
    width: int
    vocab: int
    batches: int

    def block(self, policy: str, width: int) -> float:
        """Seconds of one block: in proportion to its weights."""
        return self.blocks[policy] * (width / self.width) ** 2

    def stage(self, name: str, layers: int, width: int, vocab: int) -> float:
        """Seconds of a stage that is one job."""
        body, own = layers * width**2, self.layers * self.width**2
        if name == "evaluate":
            return self.stages[name] * (12 * body + vocab * width) / (12 * own + self.vocab * self.width)
        return self.stages[name] * (body / own if name in ("activations", "proxies", "pack") else 1.0)

    def line(self, name: str, size: tuple[int, int], vocab: int, policies: Sequence[str]) -> list[Task]:
        """The tasks of one model: windows, activations and proxies once, the rest for each policy."""
        tasks = [Task(f"{name} windows", self.stage("windows", *size, vocab))]
        for stage, cores in (("activations", self.batches), ("proxies", 1)):
            tasks.append(Task(f"{name} {stage}", self.stage(stage, *size, vocab), (tasks[-1].name,), cores))
        prepared = tasks[-1].name
        for policy in policies:
            cell = f"{name} {policy}"
            tasks.append(Task(f"{cell} plan", self.stage("plan", *size, vocab), (prepared,)))
            after = (tasks[-1].name,)
            blocks = [Task(f"{cell} block {i}", self.block(policy, size[1]), after) for i in range(size[0])]
            tasks += [*blocks, Task(f"{cell} pack", self.stage("pack", *size, vocab), tuple(b.name for b in blocks))]
            for stage, cores in (("evaluate", MACHINE), ("report", 1)):
                tasks.append(Task(f"{cell} {stage}", self.stage(stage, *size, vocab), (tasks[-1].name,), cores))
        return tasks


def costs_of(found: Mapping[str, Any]) -> Costs:
    """The costs that the measurements of one worker give."""
    model = found["model"]
    layers = model["layers"]
    blocks = {policy: mean(seconds[:layers]) for policy, seconds in found["policies"].items()}
    alone = [row["stages"] for row in found["line"] if row["workers"] == 1]
    stages = {name: mean(row[name] for row in alone) for name in alone[0]}
    return Costs(blocks, stages, layers, model["width"], model["vocab"], max(1, found["windows"] // 2))


def machines_of(workers: int) -> list[int]:
    """Cores of each machine that together have `workers`."""
    return [MACHINE] * (workers // MACHINE) if workers > MACHINE else [workers]


def page(found: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    costs = costs_of(found)
    simulated = [
        ("the demo family: 3 models x 3 policies", _family(costs, DEMO, costs.vocab, POLICIES)),
        ("one 14B model, policy rwkvquant", _family(costs, FOURTEEN, RELEASED_VOCAB, ("rwkvquant",))),
        ("its stage `quantize` alone", _blocks(costs, *FOURTEEN["14B"])),
        ("ten released sizes x 3 policies", _family(costs, RELEASED, RELEASED_VOCAB, POLICIES)),
    ]
    rows = [_row(name, work, workers, found["dispatch"]) for name, work in simulated for workers in SIMULATED]
    return f"""# What more workers bring

Made by `python -m benchmarks.scaling` (its docstring has the options; the times of every task: scaling.json) on
{found["cores"]} cores, model {found["model"]["name"]} ({found["model"]["layers"]} blocks). One torch thread a worker.

## Measured

Stage `quantize` alone, on worker processes that are up:

{_measured(found["quantize"])}

The whole line as a flow, imports and Prefect's server included:

{_measured(found["line"])}

Seconds of each stage in the whole line:

{_stages(found["line"])}

Prefect takes {1000 * found["dispatch"]:.0f} ms for a task that does nothing (runner `threads`, one worker).

## The simulator against the measurement

From the seconds of every task with one worker, it says of the same work on other numbers of workers:

{_validation(found)}

## Simulated

{markdown_table(["work", "workers", "tasks", "hours", "speed-up", "efficiency", "limit of speed-up"], rows)}

Efficiency: core seconds of all tasks / (workers x time). Limit: core seconds / longest chain of tasks, which no number
of machines of {MACHINE} cores goes below. Ready tasks start in the order of their longest remaining path; one
scheduler hands them out, at the measured time a task.

What limits it:

{_limits(costs)}

Assumptions: a block's seconds grow with its weights, as those of activations, proxies, pack and evaluation do (the
cubic part of GPTQ, small at the measured width, is left out: it makes large blocks longer, and changes the order of no
figure above); `activations` and `evaluate` use the cores of one machine at full efficiency, the other stages one core;
moving files is free (a store adds the time of its network to each block; blocks overlap with it).
"""


def _family(costs: Costs, models: Mapping[str, tuple[int, int]], vocab: int, policies: Sequence[str]) -> Work:
    return work_of([task for name, size in models.items() for task in costs.line(name, size, vocab, policies)])


def _blocks(costs: Costs, layers: int, width: int) -> Work:
    return work_of([Task(str(index), costs.block("rwkvquant", width)) for index in range(layers)])


def _row(name: str, work: Work, workers: int, dispatch: float) -> list[str]:
    seconds = simulate(work, machines_of(workers), dispatch)
    gain, limit = work.total / seconds, work.total / work.critical_path(MACHINE)
    figures = f"{seconds / 3600:.3g}", f"{gain:.1f}", f"{100 * gain / workers:.0f} %", f"{limit:.1f}"
    return [name, str(workers), str(len(work.tasks)), *figures]


def _measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a round: seconds by number of workers, and how many times as fast as one worker of the same round."""
    counts = sorted({row["workers"] for row in rows})
    by_count = {count: [row for row in rows if row["workers"] == count] for count in counts}
    same = len({row["hash"] for row in rows}) == 1
    table = []
    for number in range(len(by_count[counts[0]])):
        walls = {count: by_count[count][number]["wall"] for count in counts}
        ratios = [f"{walls[1] / walls[count]:.2f}" for count in counts if count != 1]
        table.append([str(number + 1), *(f"{wall:.1f}" for wall in walls.values()), *ratios])
    header = ["round", *(f"{count}, s" for count in counts), *(f"ratio at {count}" for count in counts if count != 1)]
    return markdown_table(header, table) + f"\n\nBytes of all runs: {'equal' if same else 'DIFFERENT'}."


def _stages(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({row["workers"] for row in rows})
    table = []
    for name in rows[0]["stages"]:
        means = [mean(row["stages"][name] for row in rows if row["workers"] == count) for count in counts]
        table.append([name, *(f"{value:.1f}" for value in means)])
    return markdown_table(["stage", *(f"{count} worker{'s' * (count > 1)}" for count in counts)], table)


def _validation(found: Mapping[str, Any]) -> str:
    table = []
    one = [row for row in found["quantize"] if row["workers"] == 1]
    jobs = [mean(seconds) for seconds in zip(*(row["jobs"] for row in one), strict=True)]
    costs = costs_of(found)
    rest = mean(row["wall"] - sum(row["stages"].values()) for row in found["line"] if row["workers"] == 1)
    for count in sorted({row["workers"] for row in found["quantize"]}):
        blocks = work_of([Task(str(index), seconds) for index, seconds in enumerate(jobs)])
        simulated = simulate(blocks, [count])
        table.append(_compared("quantize", count, simulated, found["quantize"]))
        scale = costs.stages["quantize"] / sum(jobs)
        line = work_of(_own_line(costs, [seconds * scale for seconds in jobs]))
        table.append(_compared("whole line", count, rest + simulate(line, [count], found["dispatch"]), found["line"]))
    return markdown_table(["work", "workers", "simulated, s", "measured, s (mean)", "error"], table)


def _own_line(costs: Costs, jobs: Sequence[float]) -> list[Task]:
    """The line that was measured, with its own blocks."""
    tasks: list[Task] = []
    cores = {"activations": costs.batches, "evaluate": MACHINE}
    for name in ("windows", "activations", "proxies", "plan", "quantize", "pack", "evaluate", "report"):
        if name not in costs.stages:
            continue
        after = (tasks[-1].name,) if tasks else ()
        if name == "quantize":
            blocks = [Task(f"block {index}", seconds, after) for index, seconds in enumerate(jobs)]
            tasks += [*blocks, Task(name, 0.0, tuple(task.name for task in blocks))]
        else:
            tasks.append(Task(name, costs.stages[name], after, cores.get(name, 1)))
    return tasks


def _compared(name: str, count: int, simulated: float, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    measured = mean(row["wall"] for row in rows if row["workers"] == count)
    error = f"{100 * (simulated / measured - 1):+.0f} %"
    return [name, str(count), f"{simulated:.1f}", f"{measured:.1f}", error]


def _limits(costs: Costs) -> str:
    """The reasons, with the figures of the 14B model."""
    layers, width = FOURTEEN["14B"]
    block = costs.block("rwkvquant", width) / 3600
    hours = {name: costs.stage(name, layers, width, RELEASED_VOCAB) / 3600 for name in costs.stages}
    shared = {name: f"{hours[name] / MACHINE:.2g} h on {MACHINE} cores" for name in ("activations", "evaluate")}
    return f"""- One block is the smallest unit: {block:.2g} h at width {width}. On 64 workers {layers} blocks leave
  {64 - layers} of them idle; on 8 they take {-(-layers // 8)} rounds, the last one of {layers % 8 or 8} blocks.
- The stages of one model follow each other. Before its blocks one machine works alone: activations
  {shared["activations"]}, proxies {hours["proxies"]:.2g} h on one core; after them evaluation, {shared["evaluate"]}.
  Other models fill these gaps; a single one cannot.
- A family ends with its largest model; the longest remaining path goes first, so that small models fill the gaps."""
