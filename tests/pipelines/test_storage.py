"""The same build on an object store: an S3 server that the test starts."""

from __future__ import annotations

import hashlib

import pytest
import yaml
from moto.server import ThreadedMotoServer

from pipelines.engine import Context
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.storage import Folder


@pytest.fixture
def bucket(monkeypatch, request):
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = request.node.name.replace("_", "-")  # the server forgets nothing while the process lives
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_corpus_and_sources_on_s3_give_the_same_shards(bucket, photo_folder, recipe_file, corpus_path):
    photos = Folder(f"{bucket}/photos")
    for file in sorted(photo_folder.iterdir()):
        photos.write_bytes(file.name, file.read_bytes())
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["sources"][0]["path"] = photos.url
    corpus = Folder(f"{bucket}/corpora/small")
    build(Context(corpus, RECIPE.model_validate(recipe), ""), workers=0)

    local = Folder(str(corpus_path))
    shards = local.list("data", ".tar")
    assert corpus.list("data", ".tar") == shards and len(shards) > 3
    for name in shards:
        assert hashlib.sha256(corpus.read_bytes(name)).digest() == hashlib.sha256(local.read_bytes(name)).digest()
    assert corpus.exists("manifest.json")


def test_ranges_listing_and_removal(bucket):
    folder = Folder(f"{bucket}/some")
    folder.write_bytes("a/b.bin", b"0123456789")
    folder.write_json("a/c.json", {"x": 1})
    assert folder.read_bytes("a/b.bin", 2, 5) == b"234"
    assert folder.list("a") == ["a/b.bin", "a/c.json"] and folder.list("none") == []
    assert folder.size("a/b.bin") == 10
    folder.remove("a")
    assert not folder.exists("a/b.bin")
    with folder.writing("whole.bin") as local:
        local.write_bytes(b"x" * 1000)
    assert folder.size("whole.bin") == 1000
