"""Merged tokens: averages of clusters found by loops, and tomesd's own results."""

import builtins

import pytest
import torch

from elfatt.conversion.merging import Matching, TokenMerging


def tokens(size, batch=2, channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size[0] * size[1], channels, generator=generator, dtype=torch.float64)


def clusters(x, size, stride, count):
    """For one image: which tokens each token is averaged with, cells' first tokens as destinations."""
    height, width = size
    ends = [
        row * stride * width + column * stride for row in range(height // stride) for column in range(width // stride)
    ]
    found = {}
    for token in set(range(len(x))) - set(ends):
        likeness = [torch.cosine_similarity(x[token], x[end], dim=0).item() for end in ends]
        found[token] = max(likeness), ends[likeness.index(max(likeness))]
    merged = sorted(found, key=lambda token: -found[token][0])[:count]
    groups = {end: [end, *(token for token in merged if found[token][1] == end)] for end in ends}
    return {token: group for group in groups.values() for token in group} | {
        token: [token] for token in set(found) - set(merged)
    }


@pytest.mark.parametrize(("size", "stride"), [((4, 6), 2), ((8, 8), 4), ((5, 9), 4), ((7, 3), 2)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_tokens_get_the_average_of_their_cluster(size, stride, share):
    x = tokens(size)
    matching = Matching(x, size, stride)
    count = int(share * matching.rest.shape[1])
    merged = matching.merge(x, count)
    assert merged.shape == (2, x.shape[1] - count, 5)
    found = matching.unmerge(merged, count)
    for b in range(len(x)):
        for token, group in clusters(x[b], size, stride, count).items():
            torch.testing.assert_close(found[b, token], x[b, group].mean(0))


@pytest.mark.parametrize(("count", "further"), [(0, 40), (20, 45), (45, 45)])
def test_merging_in_two_goes_is_merging_in_one(count, further):
    x, size = tokens((6, 9)), (6, 9)
    y = tokens(size, seed=1)
    matching = Matching(x, size, 4)
    torch.testing.assert_close(
        matching.merge_further(matching.merge(y, count), count, further), matching.merge(y, further)
    )


def test_half_precision_counts_many_tokens():
    x = torch.ones(1, 64 * 64, 1, dtype=torch.float16)
    matching = Matching(x, (64, 64), 64)
    torch.testing.assert_close(matching.merge_further(x[:, :], 0, 4095), x[:, :1])


@pytest.mark.parametrize("chance", [False, True])
def test_the_matching_is_that_of_tomesd(chance):
    tomesd = pytest.importorskip("tomesd")
    size, x = (8, 12), tokens((8, 12))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        x, 12, 8, 4, 4, 38, no_rand=not chance, generator=generators[0]
    )
    matching = Matching(x, size, 4, generators[1] if chance else None)
    torch.testing.assert_close(matching.unmerge(matching.merge(x, 38), 38), unmerge(merge(x)))


@pytest.mark.parametrize("ratio", [-0.1, 0.76, float("nan")])
def test_a_ratio_out_of_range_is_named(ratio):
    with pytest.raises(ValueError, match=f"^merge_ratio={ratio} must be from 0 to 0.75.*$"):
        TokenMerging(ratio)


def test_without_tomesd_the_command_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "tomesd":
            raise ImportError("no")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="^merge_ratio=0.5 needs tomesd: pip install tomesd$"):
        TokenMerging(0.5)
