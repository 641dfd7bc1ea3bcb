"""Every notebook runs from start to end, shows what it promises, and is stored without what it showed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from safetensors.torch import load_file

from fine_tune.metrics import read_metrics
from pipelines.lint import lint
from pipelines.storage import Folder

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
STEPS = 4


@pytest.fixture
def out(corpus_path: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where notebooks write. They read what the tests have instead of the demo; the kernel inherits it."""
    values = {"X2I_CORPUS": corpus_path, "X2I_PHOTOS": photo_folder, "X2I_OUT": tmp_path / "out", "X2I_STEPS": STEPS}
    values |= {"IPYTHONDIR": tmp_path / "ipython", "JUPYTER_RUNTIME_DIR": tmp_path / "jupyter"}
    values |= {"OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, "RAY_raylet_start_wait_time_s": 300}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("X2I_ADDRESS", raising=False)
    return tmp_path / "out"


def cell(notebook: NotebookNode, words: str) -> NotebookNode:
    """The only code cell with these words."""
    (found,) = (cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source)
    return found


def printed(cell: NotebookNode) -> str:
    shown = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return "".join(shown)


def pictures(notebook: NotebookNode) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def inspect_shards(notebook: NotebookNode, out: Path) -> None:
    assert pictures(notebook) == 5
    assert "photograph " in printed(notebook.cells[-1])


def submit_a_job(notebook: NotebookNode, out: Path) -> None:
    def stages(job: str) -> dict[str, str]:
        lines = printed(cell(notebook, job)).splitlines()
        return {line.split()[0]: line for line in lines if "rows: " in line}

    assert "up to date" not in stages("first = ")["build"]
    assert {"ingest", "score", "build", "pack"} <= set(stages("again = "))
    assert all("up to date" in line for line in stages("again = ").values())
    changed = stages("changed = ")
    assert "up to date" in changed["score"] and "up to date" not in changed["build"]
    assert "dropped" in changed["decide"]
    states = [line.split()[1] for line in printed(notebook.cells[-1]).splitlines()]
    assert states == ["SUCCEEDED"] * 3 + ["STOPPED"]
    assert lint(Folder(str(out))) == []
    assert pictures(notebook) == 3


def fine_tune_on_your_data(notebook: NotebookNode, out: Path) -> None:
    assert [line["step"] for line in read_metrics(out / "run/metrics.jsonl") if line["kind"] == "held_out"] == [
        0,
        STEPS,
    ]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    base, merged = (load_file(out / folder / weights) for folder in ("base", "model"))
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    changed = set()
    for name, weight in merged.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in adapter:
            added = adapter.pop(f"{layer}.lora_B.weight") @ adapter.pop(f"{layer}.lora_A.weight")
            assert (weight - base[name] - added).abs().max() < 1e-5 < added.abs().max()
            changed.add(name)
        else:
            assert weight.equal(base[name])
    assert changed and not adapter
    assert pictures(notebook) == 5


PROMISES: dict[str, Callable[[NotebookNode, Path], None]] = {
    promise.__name__: promise for promise in (inspect_shards, submit_a_job, fine_tune_on_your_data)
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_promises(path: Path, out: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert notebook.cells[-1].outputs, "its last cell shows nothing"
    PROMISES[path.stem](notebook, out)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.cells[0].source.startswith("# ")
    assert notebook.metadata.kernelspec.name == "python3"
