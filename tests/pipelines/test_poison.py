"""A row that kills its process is found and quarantined; everything else is built as if it had not been there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import ledger
from pipelines.storage import Folder

# A decoder that crashes on one file, as a broken native library would: loaded by every Python process of the build.
CRASHING_DECODER = """
import hashlib, os, signal, sys
if any(word in " ".join(sys.orig_argv) for word in ("x2i", "pipelines", "default_worker")):
    import pipelines.images as images
    decode = images.normalise
    def normalise(data, *args, **kwargs):
        if hashlib.sha256(data).hexdigest() == {poison!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data, *args, **kwargs)
    images.normalise = normalise
"""


@pytest.mark.slow
def test_poison_is_bisected_and_quarantined(tmp_path, photo_folder, recipe_file):
    poison = hashlib.sha256((photo_folder / "coffee.jpg").read_bytes()).hexdigest()
    (tmp_path / "sitecustomize.py").write_text(CRASHING_DECODER.format(poison=poison))
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    command = [sys.executable, "-m", "pipelines.cli", "build", str(recipe_file), "-c", str(tmp_path / "corpus")]
    subprocess.run([*command, "--workers", "1", "--until", "ingest"], env=env, check=True, cwd=root, timeout=300)
    corpus = Folder(str(tmp_path / "corpus"))
    rows = [r for n in corpus.list("meta/ledger/ingest", ".parquet") for r in corpus.read_table(n).to_pylist()]
    assert [(Path(r["input"]).name, r["reason"]) for r in rows if r["status"] != "kept"] == [("coffee.jpg", "poison")]
    counts = ledger.totals(m.counts for m in ledger.read_markers(corpus, "ingest").values())
    assert counts == {"inputs": 8, "kept": 7, "dropped": 0, "quarantined": 1}
    assert corpus.list("work/attempts") == []
