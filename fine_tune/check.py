"""Look at every sample of a corpus once, as a run would see it, before the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from fine_tune.data import SampleSettings, make_example, read_images
from fine_tune.index import Corpus, CountRule, SampleError, Skip, SkipLog, StreamIndex, open_index
from fine_tune.order import Plan, stream_shares
from fine_tune.presets import Config
from fine_tune.state import load_tokenizer
from fine_tune.tokens import Tokenizer

_AT_ONCE = 256  # samples decoded between two looks at the results


@dataclass
class StreamReport:
    """What one stream gives to train on.

    Attributes:
        name: of the stream.
        samples: usable ones by the index; `bad` of them could not be read.
        tokens: median and largest number per sample.
        target_sizes: samples by (height, width) of the fitted target.
        requested, realised, tokens_share: shares in a block, of samples asked for, of samples and of tokens.
    """

    name: str
    samples: int
    bad: int
    tokens: tuple[int, int]
    target_sizes: Counter[tuple[int, int]]
    requested: float
    realised: float
    tokens_share: float


@dataclass
class CheckReport:
    """The result of `check`.

    Attributes:
        streams: one report each; streams that the mixture leaves out are not read.
        left_out: samples that the index does not let through.
        bad: samples that the index lets through but that cannot be read.
        seen: samples of the split.
        fill: share of the rows of packs that hold a token.
        max_skip_rate: share of bad samples at which a run would stop.
    """

    streams: list[StreamReport]
    left_out: SkipLog
    bad: SkipLog
    seen: int
    fill: float
    max_skip_rate: float

    @property
    def is_good(self) -> bool:
        """A run would not stop because of its data."""
        read = sum(stream.samples for stream in self.streams)
        return self.bad.total <= self.max_skip_rate * read


def check(config: Config, split: str | None = None) -> CheckReport:
    """Read, decode, fit and tokenise every sample of a split, shard by shard.

    Raises:
        CorpusError: there is nothing to train on.
    """
    data = config.data
    corpus, tokenizer = Corpus(data.corpus), load_tokenizer(config.model)
    rule = CountRule(tokenizer, data.max_side, data.budget, draws=config.flow.draws)
    index = open_index(corpus, split or data.split, rule)
    plan = Plan(index, stream_shares(index, data.mixture), data.seed, data.budget, data.block)
    shares = plan.report()
    read = partial(_read, corpus, tokenizer, SampleSettings(max_side=data.max_side, edit_masks=True))
    bad, streams = SkipLog(), []
    with ThreadPoolExecutor(data.workers) as pool:
        for stream in plan.streams:
            sizes, skips = _read_stream(pool, partial(read, stream), len(stream))
            bad.add(skips)
            share = shares[stream.name]
            streams.append(
                StreamReport(
                    name=stream.name,
                    samples=len(stream),
                    bad=len(skips),
                    tokens=(int(np.median(stream.tokens)), int(stream.tokens.max())),
                    target_sizes=sizes,
                    requested=share["requested"],
                    realised=share["realised"],
                    tokens_share=share["tokens"],
                )
            )
    return CheckReport(streams, index.skips, bad, index.samples_seen, plan.fill(), data.max_skip_rate)


def _read_stream(
    pool: ThreadPoolExecutor, read: Callable[[int], tuple[int, int] | Skip], samples: int
) -> tuple[Counter[tuple[int, int]], list[Skip]]:
    """Counts of target sizes, and what could not be read; in order of the shards."""
    sizes: Counter[tuple[int, int]] = Counter()
    skips = []
    for start in range(0, samples, _AT_ONCE):
        for result in pool.map(read, range(start, min(start + _AT_ONCE, samples))):
            if isinstance(result, Skip):
                skips.append(result)
            else:
                sizes[result] += 1
    return sizes, skips


def _read(
    corpus: Corpus, tokenizer: Tokenizer, settings: SampleSettings, stream: StreamIndex, item: int
) -> tuple[int, int] | Skip:
    """(height, width) of the fitted target, or why the sample cannot be used."""
    row = corpus.row(stream, item)
    try:
        images = read_images(corpus, row)
        example = make_example(row, images, tokenizer, settings.without_augmentation(), seed=0, epoch=0)
    except SampleError as error:
        return Skip(row["shard"], row["key"], error.reason, str(error))
    height, width = example.target.shape[1:]
    return height, width
