"""`python -m qwenvl_lit.check`: reads a whole dataset and reports what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_lit.bounds import check_number
from qwenvl_lit.cli.command import command
from qwenvl_lit.cli.early_checks import check_files, datasets_of, sources
from qwenvl_lit.libraries import import_libraries
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig


SPLITS = ("train", "validation", "test")
NOTHING = "there is nothing to check: give data.train=FILE, data.validation=FILE or data.test=FILE"


def main(config: DictConfig) -> None:
    _require_files(config)
    check_files(config, SPLITS)
    import_libraries()

    from qwenvl_lit import build
    from qwenvl_lit.cores import available_cores
    from qwenvl_lit.data.inspection import inspect
    from qwenvl_lit.rendering.progress import progress_bars
    from qwenvl_lit.rendering.table import output_console
    from qwenvl_lit.reports.data import print_summary, write_findings
    from qwenvl_lit.reports.data_page import examples, write_page

    build.start(config)
    check_number("workers", config.workers, least=1, most=1024, whole=True, optional=True)
    check_number("examples", config.examples, least=0, whole=True)
    processor = build.processor(config)
    data = build.data(config, processor)
    data.prepare_data()
    training_sets, test_sets = data.sets()
    sets = {**training_sets, **test_sets}
    if not sets:
        raise DataError(NOTHING)
    with progress_bars() as report:
        inspection = inspect(
            sets,
            processor,
            prompts=test_sets,
            max_bad_fraction=data.max_bad_fraction if data.on_bad_image == "drop" else None,
            workers=config.workers or available_cores(),
            progress=report,
        )
    folder = Path(config.paths.run)
    findings, page = folder / "findings.jsonl", folder / "report.html"
    write_findings(inspection, findings)
    shown = examples(inspection, sets, processor, count=config.examples, seed=config.seed)
    write_page(inspection, shown, page, title=f"Data of {build.shown(config.paths.run)}")
    print_summary(inspection, output_console())
    print(f"\nReport: {build.shown(str(page))}   all findings: {build.shown(str(findings))}")
    sys.exit(bool(inspection.errors))


def _require_files(config: DictConfig) -> None:
    """Raises an error if all datasets have the keys of files, and none of these names a file."""
    for dataset in datasets_of(config):
        for split in SPLITS:
            if split not in dataset or any(sources(dataset[split])):
                return
    raise DataError(NOTHING)


if __name__ == "__main__":
    command("check", main)
