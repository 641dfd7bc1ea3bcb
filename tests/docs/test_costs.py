"""Hours and dollars of docs/cluster.md follow from the measured rates, by the arithmetic that stands beside them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text()
RESULTS = (ROOT / "benchmarks/RESULTS.md").read_text()


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_hours_follow_from_measured_rates() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([\d.,]+) \| ([\d.,]+) \|$", PAGE, re.M)
    assert len(rows) == 9
    for work, rate, hours in rows:
        assert number(hours) == round(1e6 / number(rate) / 3600, 1), work
        name = work.strip("`").split("`")[0]
        if name.startswith("edit pairs"):
            assert f"{name.split()[2].rstrip(',')} {rate}" in RESULTS, work
        elif name.startswith("ingest"):
            (two_cores,) = re.findall(r"^\| x2i \| [\d.]+ \| ([\d.]+) \|", RESULTS, re.M)
            assert number(rate) == number(two_cores) / 2
        else:
            assert re.search(rf"^\| {name}[^|]* \| {rate} \|", RESULTS, re.M), work


def test_the_example_adds_up() -> None:
    hours = [number(h) for h in re.findall(r"^\| [^|]+ \| [\d.,]+ \| ([\d.,]+) \|$", PAGE, re.M)]
    example = re.search(r"the first (\w+) lines are ([\d.]+) core hours. With P = \$([\d.]+)", PAGE)
    assert example and example[1] == "five"
    total, price = number(example[2]), number(example[3])
    assert total == round(sum(hours[:5]), 1) and price == round(0.68 / 16, 4)
    assert f"**${price * total / 0.8:.2f}**" in PAGE
    assert f"(90.8 + {hours[6]}): ${price * (total + hours[6]) / 0.8:.2f}" in PAGE
