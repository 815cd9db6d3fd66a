"""What any number of experts costs: against the model run by hand, and a rule that helps against one that does not."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe_lens import HookedMoE, names
from moe_lens.data import Reading, batch_windows, shards
from moe_lens.errors import InputError
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.stats import LossResult
from moe_lens.studies import ExpertsPerToken, StudyResult, compare, run
from moe_lens.studies.experts_per_token import shuffle_numbers, table
from moe_lens.studies.experts_used import Used, label, parts
from moe_lens.studies.variant_losses import WHOLE, VariantLosses
from tests.families import build
from tests.studies.tiny import TOKENIZER, domain, tiny_model

READING = Reading(tokens=None, context=24, shard_tokens=10**6)
STUDY = ExpertsPerToken(k=(1, 6), mass=(0.5,), entropy=(0.4,))


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


@pytest.fixture(scope="module")
def result(model: HookedMoE) -> StudyResult:
    return run(STUDY, model, [domain("d", n=10, sources=10)], reading=READING, batch_tokens=150)


def test_rules_are_called_by_all_digits_of_their_values_and_by_no_number_of_experts(result: StudyResult) -> None:
    values = (0.1234567, 0.1234568, 1.0)
    said = [label("mass", value, shuffled) for value in values for shuffled in (False, True)]
    assert len(set(said)) == 6 and said[4:] == ["mass 1", "mass 1 shuffled"]
    assert [parts((each, None, 0)) for each in said[::2]] == [("mass", value, False) for value in values]
    found = compare(result, result).table
    rules = ("mass 0.5", "entropy 0.4")
    assert set(found["of"]) == {"whole, k = 3", "k = 1", "k = 6", *rules, *(f"{rule} shuffled" for rule in rules)}


@pytest.mark.typed
def test_losses_and_numbers_are_those_of_the_model_run_text_by_text(model: HookedMoE, result: StudyResult) -> None:
    (shard,) = shards(domain("d", n=10, sources=10), model, READING)
    found = result.tables["numbers"].set_index(["rule", "value", "shuffled"])
    seen: list[torch.Tensor] = []
    hook = [(names.mlp(names.N_ACTIVE, at), lambda n, hook: seen.append(n[0, :, 0])) for at in model.moe_layers]
    ways = {("k", 1.0): {"k": 1}, ("k", 6.0): {"k": 6}, ("k", 3.0): {"k": 3}, ("mass", 0.5): {"mass": 0.5}}
    for (rule, value), options in ways.items():
        nats, tokens, used = 0.0, 0, []
        for window in shard.windows:
            ids = torch.tensor([window.ids])
            seen.clear()
            with torch.no_grad(), model.use_experts(**options):
                logits = model.run_with_hooks(ids, fwd_hooks=hook)
            nats += float(cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
            used.append(torch.stack(seen)[:, len(window.ids) - window.counted :])
        row = found.loc[(rule, value, False)]
        assert row["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert row["experts"] == pytest.approx(float(torch.cat(used, 1).double().mean()), rel=1e-12)
    numbers: Any = result.tables["numbers"]
    whole = numbers[["rule", "value", "own", "ratio"]].to_dict("records")
    assert [row for row in whole if row["own"]] == [{"rule": "k", "value": 3.0, "own": True, "ratio": 1.0}]
    layers: Any = result.tables["layers"]
    rows = layers[["rule", "shuffled", "experts"]].to_dict("records")
    own = [row["experts"] for row in rows if row["rule"] == "mass" and not row["shuffled"]]
    assert sum(own) / len(own) == pytest.approx(found.loc[("mass", 0.5, False), "experts"])
    assert len(set(own)) > 1


def test_shuffled_numbers_are_the_same_numbers_at_other_tokens(model: HookedMoE, result: StudyResult) -> None:
    found = result.tables["numbers"].set_index(["rule", "value", "shuffled"])
    for rule, value in STUDY.rules():
        own, shuffled = (found["loss"].to_dict()[rule, value, way] for way in (False, True))
        assert own != shuffled
    # In one layer shuffling cannot change the numbers of the layers behind.
    (shard,) = shards(domain("d", n=10, sources=10), model, READING)
    batch = next(iter(batch_windows(shard.windows, model, batch_tokens=150)))
    seen: list[torch.Tensor] = []
    layer = model.moe_layers[-1]
    watch = [(names.mlp(names.N_ACTIVE, layer), lambda n, hook: seen.append(n[..., 0].clone()))]
    hooks = [one for one in shuffle_numbers(model, batch, 0) if one[0] == watch[0][0]]
    ways = [*model.use_experts(mass=0.5, layers=[layer]).fwd_hooks]
    for more in ([], hooks):
        with torch.no_grad():
            model.run_with_hooks(batch.tokens, fwd_hooks=[*ways, *more, *watch], attention_mask=batch.mask.long())
    own, shuffled = seen
    assert not torch.equal(own[batch.counted], shuffled[batch.counted])
    for before, after, counted in zip(own, shuffled, batch.counted, strict=True):  # each window keeps its numbers
        assert torch.equal(before[counted].sort().values, after[counted].sort().values)
    assert torch.equal(own[~batch.counted], shuffled[~batch.counted])


def made(saved: float, seed: int = 0) -> tuple[VariantLosses, Used, dict[str, LossResult]]:
    """20 sources of 50 tokens; a rule of 3 experts on average that saves some nats a token, and more where it helps."""
    generator = torch.Generator().manual_seed(seed)
    variants = ((WHOLE, None, 4), (label("mass", 0.5, False), None, 0))
    tokens = torch.full((20,), 50)
    base = 200 + 10 * torch.randn(20, generator=generator, dtype=torch.float64)
    noise = torch.randn(20, generator=generator, dtype=torch.float64)
    three = base + 10 + noise
    mixed = three - 50 * saved + torch.randn(20, generator=generator, dtype=torch.float64)
    nats = torch.stack([base, mixed], 1)
    sources = tuple(f"s{i:02d}" for i in range(20))
    ones = torch.ones(20, dtype=torch.long)
    losses = VariantLosses(variants, sources, nats, tokens, nats / 50, ones)
    used = Used(variants, (0,), sources, torch.tensor([4, 3])[None, :, None] * tokens[:, None, None], tokens)
    return losses, used, {"fixed1": LossResult(sources, three, tokens, three / 50, ones)}


def test_a_rule_gains_what_was_planted_and_nothing_where_nothing_was() -> None:
    columns = ["gain", "gain_low", "gain_high"]
    gain, low, _ = table(*made(0.05))[columns].iloc[-1].tolist()
    assert gain == pytest.approx(0.05, abs=0.02)  # the noise is 1 / 50 / √20 nats
    assert low > 0
    _, low, high = table(*made(0.0))[columns].iloc[-1].tolist()
    assert low < 0 < high
    assert math.isnan(table(*made(0.05))["gain"].tolist()[0])


def test_a_gain_is_over_the_two_whole_numbers_beside_the_mean_whichever_were_asked_for(model: HookedMoE) -> None:
    texts = [domain("d", n=10, sources=10), domain("e", n=4, sources=4)]
    far, near = (
        run(ExpertsPerToken(k=k, mass=(0.5,)), model, texts, reading=READING).tables["numbers"].to_dict("records")
        for k in ((1, 8), tuple(range(1, 9)))
    )
    rules, others = ([row for row in rows if row["rule"] != "k"] for rows in (far, near))
    assert [row["gain"] for row in rules] == [row["gain"] for row in others] and len(rules) == 4
    loss = {(row["domain"], row["value"]): row["loss"] for row in near if row["rule"] == "k"}
    for row in rules:
        name, (low, part) = row["domain"], divmod(row["experts"], 1)
        assert 0.05 < part < 0.95, "not whole"
        right = (1 - part) * loss[name, low] + part * loss[name, low + 1]
        assert row["gain"] == pytest.approx(right - row["loss"], abs=1e-12)  # float64, of the same passes
        part = (row["experts"] - 1) / 7
        assert abs((1 - part) * loss[name, 1] + part * loss[name, 8] - right) > 1e-3, "a control: a line from 1 to 8"


def test_what_is_run_if_nothing_is_said(model: HookedMoE) -> None:
    assert ExpertsPerToken().numbers(model) == [1, 2, 4, 6, 8]  # 3 of 8 experts
    with pytest.raises(InputError, match="k is 9; expected a whole number from 1 to 8"):
        run(ExpertsPerToken(k=(9,)), model, [domain("d")])
    with pytest.raises(InputError, match="mass is 2.0"):
        run(ExpertsPerToken(mass=(2.0,)), model, [domain("d")])


@pytest.mark.typed
def test_numbers_are_those_of_the_groups_that_the_router_leaves_to_a_token() -> None:
    """Two of four groups of two experts: the default runs, where all eight would be refused."""

    def of(chosen: int) -> HookedMoE:
        hf = build("deepseek_v3", vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1, topk_group=chosen)
        return HookedMoE.from_hf(hf, load_tokenizer(str(TOKENIZER))).requires_grad_(False)

    model, everywhere = of(2), of(4)
    study = ExpertsPerToken(mass=())
    found = run(study, model, [domain("d", n=2, sources=2)], reading=READING).tables["numbers"]
    assert set(found["value"]) == {1, 2, 3, 4}
    with pytest.raises(InputError, match="k is 5; the groups that the router leaves to a token hold 4 experts"):
        run(ExpertsPerToken(k=(5,)), model, [domain("d")])
    ExpertsPerToken(k=(5,)).check(everywhere)
    assert study.numbers(everywhere) == [1, 2, 4, 6, 8], "the control: all groups"
