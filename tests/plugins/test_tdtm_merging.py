"""The arithmetic of merging along time."""

import pytest
import torch
from blockstream_tdtm import merge, merge_reference, positions, unmerge, unmerge_reference
from hypothesis import given, settings
from hypothesis import strategies as st

FRAMES = st.integers(1, 40)
FACTORS = st.integers(2, 5)


def frames(T):
    """Tokens [2, T, 3, 5] whose every number differs."""
    return torch.arange(2.0 * T * 15).reshape(2, T, 3, 5) ** 1.5


def test_each_two_frames_become_their_mean():
    x = frames(4)
    assert torch.equal(merge(x), torch.stack(((x[:, 0] + x[:, 1]) / 2, (x[:, 2] + x[:, 3]) / 2), 1))


def test_an_odd_last_frame_passes_unmerged():
    x = frames(5)
    assert torch.equal(merge(x)[:, 2], x[:, 4])
    assert torch.equal(unmerge(merge(x), 5)[:, 4], x[:, 4])
    assert positions(5) == [0.5, 2.5, 4.0]


def test_the_reference_replaces_an_odd_last_frame_by_a_copy_of_the_last_mean():
    x = frames(5)
    assert merge_reference(x).shape[1] == 2
    back = unmerge_reference(merge_reference(x), 5)
    assert torch.equal(back[:, 4], (x[:, 2] + x[:, 3]) / 2)


@settings(deadline=None)
@given(FRAMES, FACTORS)
def test_unmerging_restores_the_length_and_gives_each_frame_its_own_group(T, factor):
    x = frames(T)
    back = unmerge(merge(x, factor), T, factor)
    assert back.shape == x.shape
    for t in range(T):
        first = t // factor * factor
        group = x[:, first : first + factor] if first + factor <= T else x[:, t : t + 1]
        torch.testing.assert_close(back[:, t], group.mean(1))


@settings(deadline=None)
@given(FRAMES, FACTORS)
def test_positions_are_where_a_linear_motion_puts_the_merged_frames(T, factor):
    moving = torch.arange(float(T)).reshape(1, T, 1, 1)
    assert merge(moving, factor).flatten().tolist() == pytest.approx(positions(T, factor))


@settings(deadline=None)
@given(FRAMES, FACTORS)
def test_still_frames_pass_through_unchanged(T, factor):
    still = torch.randn(1, 1, 2, 4).expand(2, T, 2, 4)
    torch.testing.assert_close(unmerge(merge(still, factor), T, factor), still)
    if factor <= T:
        torch.testing.assert_close(unmerge_reference(merge_reference(still, factor), T, factor), still)


def test_lengths_that_do_not_fit_and_factors_that_merge_nothing_are_refused():
    with pytest.raises(ValueError, match="3 merged frames cannot become 8: those merge to 4 by 2"):
        unmerge(frames(3), 8)
    with pytest.raises(ValueError, match="3 merged frames cannot become 8"):
        unmerge_reference(frames(3), 8)
    with pytest.raises(ValueError, match="1 frames leave nothing"):
        merge_reference(frames(1))
    for function in (merge, merge_reference):
        with pytest.raises(ValueError, match="factor = 1"):
            function(frames(4), 1)


class There(torch.nn.Module):
    def __init__(self, there, back, T):
        super().__init__()
        self.there, self.back, self.T = there, back, T

    def forward(self, x):
        return self.back(self.there(x).tanh(), self.T)


@pytest.mark.parametrize("T", [8, 7])
@pytest.mark.parametrize("pair", [(merge, unmerge), (merge_reference, unmerge_reference)])
def test_both_export(T, pair):
    x = torch.randn(2, T, 3, 5)
    module = There(*pair, T)
    exported = torch.export.export(module, (x,)).module()
    y = torch.randn(2, T, 3, 5)
    assert torch.equal(exported(y), module(y))
