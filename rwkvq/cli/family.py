"""Commands on families of models: `rwkvq family shared | cell | page | plan`. The flow runs the same without DVC."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkvq.cli.display import console, print_json, size, stage_bars, table
from rwkvq.files import remove_leftovers, run_lock

if TYPE_CHECKING:
    from rwkvq.family.family import Family

File = Annotated[Path, typer.Argument(help="Family file.")]
Model = Annotated[str, typer.Argument(help="Name of a model in the family file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one setting: section.key=value (repeatable).")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    family = typer.Typer(help="Families of models: one cell, shared work, the page (what DVC calls).")
    family.command()(plan)
    family.command()(shared)
    family.command()(cell)
    family.command()(page)
    app.add_typer(family, name="family")


def plan(
    file: File,
    overrides: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Dry run of a family: what would run and why, time, memory, disk, size of every result."""
    from rwkvq.family.family import load_family
    from rwkvq.family.preview import preview_family

    family = load_family(file, overrides or [])
    if as_json:
        print_json(preview_family(family).to_json())
    else:
        show_preview(family)


def shared(file: File, model: Model, overrides: Set = None) -> None:
    """Run what all policies of MODEL share: windows, activations, proxies."""
    from rwkvq import stages
    from rwkvq.errors import SettingsError
    from rwkvq.family.family import load_family
    from rwkvq.run import SHARED

    family = load_family(file, overrides or [])
    groups = [cells for cells in family.groups().values() if cells[0].model == model]
    if not groups:
        raise SettingsError(str(file), [f"no model {model!r}; models: {', '.join(family.file.models)}"])
    for cells in groups:
        run = cells[0].run
        needed = {name for member in cells for name in stages.stages_of(member.run)}
        with run_lock(run.folder_of(SHARED[0])), stage_bars() as bars:
            remove_leftovers(run.folder_of(SHARED[0]))
            stages.check_shared_inputs(run)
            for name in SHARED:
                if name in needed:
                    result = stages.run_stage(run, name, bars(name))
                    if not result.ran:
                        bars.note(name, result.reason)


def cell(
    file: File,
    model: Model,
    policy: Annotated[str, typer.Argument(help="Name of a policy (with its variant: 'POLICY VARIANT').")],
    overrides: Set = None,
) -> None:
    """Run one cell, after `shared`: plan, quantize, pack, evaluate, report."""
    from rwkvq import stages
    from rwkvq.family.family import load_family
    from rwkvq.run import SHARED

    run = load_family(file, overrides or []).cell(model, policy).run
    with run_lock(run.folder), stage_bars() as bars:
        remove_leftovers(run.folder)
        stages.check_inputs(run)
        for name in stages.stages_of(run):
            if name not in SHARED:
                result = stages.run_stage(run, name, bars(name))
                if not result.ran:
                    bars.note(name, result.reason)


def page(file: File, overrides: Set = None) -> None:
    """Write the page, the table and the metrics of a family from what its cells hold now."""
    from rwkvq.family.family import load_family
    from rwkvq.family.results import read_results, write_results

    family = load_family(file, overrides or [])
    with run_lock(family.out):
        write_results(family, read_results(family))
    show_results(family)


def show_preview(family: Family) -> None:
    """Print the dry run of a family."""
    from rwkvq.family.preview import preview_family

    preview = preview_family(family)
    console.print(table("Shared work", ("folder", "seconds", "disk", "why"), preview.shared_rows()))
    console.print()
    console.print(table("Cells", preview.HEADER, preview.cell_rows()))
    console.print(
        f"\nestimated {preview.seconds:.0f} s on {preview.workers} workers, peak memory about "
        f"{size(preview.peak_bytes)} in all, disk {size(preview.disk_bytes)}"
    )


def show_results(family: Family) -> None:
    """Print the closing table of a family, as its last run left it, and where its page lies."""
    from rwkvq.family.results import collect_family, read_summary
    from rwkvq.report.family import family_table

    results = read_summary(family)
    if not family.page.is_file() or results.keys() != {cell.name for cell in family.cells}:
        return  # no run of this file has ended yet
    closing = family_table(collect_family(family, list(results.values())))
    console.print()
    console.print(table(f"Family {family.name}", closing.columns, closing.rows))
    console.print(f"\npage  {family.page}")
