"""A PartialSum names one point, however it is written; nonsense has no name."""

import dataclasses

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.partial_sum import PartialSum

numbers = st.sets(st.integers(0, 70), min_size=1)


@given(numbers, st.randoms())
def test_ranks_are_a_set_in_whatever_order_or_container(chosen: set[int], random):
    shuffled = list(chosen)
    random.shuffle(shuffled)
    sums = {
        PartialSum(ranks=form)
        for form in (shuffled, tuple(shuffled), chosen, frozenset(chosen), dict.fromkeys(shuffled))
    }
    assert len(sums) == 1
    assert sums.pop().ranks == tuple(sorted(chosen))


@given(numbers)
def test_experts_and_ranks_are_different_things(chosen: set[int]):
    assert PartialSum(experts=chosen) != PartialSum(ranks=chosen)
    assert PartialSum(experts=chosen).label != PartialSum(ranks=chosen).label


def test_no_restriction_is_not_the_empty_set():
    assert PartialSum() != PartialSum(ranks=[])
    assert (PartialSum().restricted, PartialSum(ranks=[]).restricted, PartialSum(experts=[3]).restricted) == (
        False,
        True,
        True,
    )
    assert PartialSum(ranks=range(3)).ranks == (0, 1, 2)


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PartialSum().shared = True  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("which", "label"),
    [
        (PartialSum(), "u + routed"),
        (PartialSum(shared=True), "u + routed + shared"),
        (PartialSum(ranks=[]), "u"),
        (PartialSum(ranks=[0]), "u + rank 0"),
        (PartialSum(ranks=[5, 0, 1, 2]), "u + ranks 0-2, 5"),
        (PartialSum(ranks=[1, 0]), "u + ranks 0, 1"),
        (PartialSum(residual="pre", experts=[17], shared=True), "resid_pre + expert 17 + shared"),
        (PartialSum(residual="none", experts=[17, 4], weighted=False), "experts 4, 17 unweighted"),
        (PartialSum(residual="none", weighted=False), "routed unweighted"),
        (PartialSum(residual="none", ranks=[], shared=True), "shared"),
        (PartialSum(drawn="active"), "u + random active expert"),
        (
            PartialSum(residual="pre", drawn="unselected", weighted=False, seed=3, shared=True),
            "resid_pre + unselected expert unweighted (seed 3) + shared",
        ),
    ],
)
def test_labels_say_what_is_summed(which: PartialSum, label: str):
    assert which.label == label


anything = st.tuples(
    st.sampled_from(["mid", "pre", "none"]),
    st.one_of(
        st.none(),
        st.tuples(st.sampled_from(["ranks", "experts"]), numbers),
        st.tuples(st.just("drawn"), st.sampled_from(["active", "unselected"])),
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
)


@given(anything, anything)
def test_equal_labels_mean_equal_sums(one, other):
    def make(residual, chosen, weighted, shared, seed):
        which = {chosen[0]: chosen[1]} if chosen else {}
        if "drawn" in which:
            which["seed"] = seed
        return PartialSum(residual=residual, weighted=weighted, shared=shared, **which)

    one, other = make(*one), make(*other)
    assert (one.label == other.label) == (one == other)
    assert one != other or hash(one) == hash(other)


@pytest.mark.typed
def test_families_of_sums():
    assert [s.ranks for s in PartialSum.each_rank(3)] == [(0,), (1,), (2,)]
    assert [s.ranks for s in PartialSum.cumulative(3)] == [(), (0,), (0, 1), (0, 1, 2)]
    assert [s.ranks for s in PartialSum.leave_one_out(3)] == [(1, 2), (0, 2), (0, 1)]
    assert all(s.residual == "mid" and s.weighted and not s.shared for s in PartialSum.cumulative(3))
    assert [s.experts for s in PartialSum.each_expert(3)] == [(0,), (1,), (2,)]
    assert PartialSum.figure2(2) == (
        PartialSum(shared=True),
        PartialSum(),
        PartialSum(ranks=[0]),
        PartialSum(ranks=[1]),
    )


def test_controls_are_told_from_what_they_control():
    controls = PartialSum.controls(3, seed=7)
    assert [s.label for s in controls] == [
        "u",
        "u + random active expert (seed 7)",
        "u + rank 2",
        "u + unselected expert (seed 7)",
    ]
    assert [s.control for s in controls] == [True, True, False, True]
    assert [s.picks for s in controls] == [False, True, True, True]
    assert not any(s.control for s in PartialSum.figure2(3)) and not any(s.picks for s in PartialSum.figure2(3)[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual": "post"}, "residual is 'post'; expected one of ('mid', 'pre', 'none')"),
        ({"ranks": [0], "experts": [1]}, "got ranks and experts"),
        ({"ranks": []} | {"experts": []}, "got ranks and experts"),
        ({"ranks": [0], "drawn": "active"}, "got ranks and drawn"),
        ({"drawn": "any"}, "drawn is 'any'; expected one of ('active', 'unselected'), or None"),
        ({"seed": 3}, "seed=3 without drawn=: nothing is drawn; leave it out"),
        ({"drawn": "active", "seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"drawn": "active", "seed": 0.5}, "seed is 0.5; expected a whole number from 0"),
        ({"ranks": 0}, "ranks: got 0; expected whole numbers from 0, in a list"),
        ({"ranks": [0.0]}, "expected whole numbers"),
        ({"ranks": "01"}, "expected whole numbers"),
        ({"ranks": [True]}, "expected whole numbers"),
        ({"experts": [3, -1]}, "experts: got -1; expected whole numbers from 0"),
        ({"experts": [3, 3]}, "expected each number once"),
        ({"residual": "none", "ranks": []}, "a partial sum of nothing"),
        ({"residual": "none", "experts": set()}, "a partial sum of nothing"),
    ],
)
def test_nonsense_is_refused(arguments, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no run-time checker of annotations
    with pytest.raises(InputError) as error:
        PartialSum(**arguments)
    assert message in str(error.value)
