"""Runs the bench of faults and writes what happened.

    python scripts/run_faults.py                                   print the counts (15 minutes)
    python scripts/run_faults.py --record benchmarks/faults.json   write them, and the table of
                                                                   docs/reliability.md
    python scripts/run_faults.py -k kills                          some of the tests

The bench is the tests of tests/faults/ that are marked `faults`. Each records what it tried. The
exit status is 1 if an attempt failed, and nothing is recorded of a bench that was not run to its
end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench_data import cpu_name
from records import write_record

from qwenvl_lit.cores import available_cores
from qwenvl_lit.runs.versions import versions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- table: scripts/run_faults.py -->", "<!-- end of table -->"
ENDED = (0, 1)  # exit status of pytest after all tests; others mean that it was stopped


def run_bench(record: Path, processes: int, chosen: str | None) -> int:
    """Runs the tests; returns the exit status of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", "faults", "tests/faults"]
    command += ["-n", str(processes), "--dist", "load"]
    if chosen:
        command += ["-k", chosen]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "QWENVL_LIT_FAULTS_RECORD": str(record),
    }
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def read_rows(record: Path) -> list[dict[str, Any]]:
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in record.glob("*.json")]
    return sorted(rows, key=lambda row: (row["group"], row["kind"]))


def report_of(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    return {
        "command": "python scripts/run_faults.py --record benchmarks/faults.json",
        "device": f"{cpu_name()}, {available_cores()} of {os.cpu_count()} cores",
        "versions": versions(),
        "seconds": round(seconds),
        "note": "tried: kills, files, rows or values; failed: what each failed attempt ended with",
        "results": rows,
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown with a row for each kind of fault."""
    lines = ["| fault | | tried | passed |", "|---|---|---|---|"]
    previous = None
    for row in rows:
        group = "" if row["group"] == previous else row["group"]
        previous = row["group"]
        lines.append(f"| {group} | {described(row)} | {row['tried']:,} | {row['passed']:,} |")
    return "\n".join(lines)


def described(row: dict[str, Any]) -> str:
    """The kind of fault, with what was measured of it."""
    kind = row["kind"].replace("_target_", "`_target_`")
    if "mb_per_1000_after_warm_up" in row:
        first, last = row["mb_at_start_and_end"]
        kind += f": {first:.0f} to {last:.0f} MB"
    if "read by both" in row:
        kind += f": {row['read by both']:,} read by both readers, {row['refused']:,} refused"
    return kind


def write_table(rows: list[dict[str, Any]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table_of(rows)}\n\n{END}{after}", encoding="utf-8")


def print_rows(rows: list[dict[str, Any]]) -> None:
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        totals[row["group"]][0] += row["tried"]
        totals[row["group"]][1] += row["passed"]
        print(f"{row['group']:26} {row['kind']:48} {row['passed']:7,} of {row['tried']:7,}")
        for failure in row["failed"][:20]:
            print(f"    {failure}")
    for group, (tried, passed) in totals.items():
        print(f"{group:26} {'in all':48} {passed:7,} of {tried:7,}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="the file to write; also fills in the page")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-k", dest="chosen", help="run only tests that match, as in pytest")
    arguments = parser.parse_args()
    if arguments.record and arguments.chosen:
        parser.error("a record is of all tests: leave out -k")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        status = run_bench(Path(folder), arguments.processes, arguments.chosen)
        rows = read_rows(Path(folder))
    print_rows(rows)
    if status not in ENDED:
        print(f"the bench was stopped (exit status {status} of pytest); nothing is recorded")
        return 1
    if arguments.record:
        report = report_of(rows, time.monotonic() - start)
        write_record(arguments.record, report)
        write_table(rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
