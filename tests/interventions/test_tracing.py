"""Causal tracing against full forward passes, its identities, and prompts that it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, names
from moe_lens.errors import InputError
from moe_lens.interventions.causal_tracing import trace
from moe_lens.interventions.embedding_noise import embedding_deviation
from moe_lens.interventions.trace_result import SiteEffects, TraceResult
from moe_lens.resampling import MIN_SOURCES, bootstrap
from tests.matrix.configs import build as build_family
from tests.test_docs import DOCS, code_of
from tests.wrapped import untouched

PROMPT = "def add(a, b):\n    return a +"
CLOSE = 1e-12  # of probabilities, in float64


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float64)


@pytest.fixture(scope="module")
def result(model: HookedMoE) -> TraceResult:
    with untouched(model):
        return trace(model, PROMPT, ", b", " b", draws=3, seed=1)


class Naive:
    """The same noise, and full forward passes with plain hooks."""

    # Listening inside of attention would select the eager one, which rounds to float32.
    wanted = (names.RESID_POST, names.ATTN_OUT, "mlp.hook_out", names.BLOCK_MLP_OUT, names.EXPERT_INDICES)
    wanted += (names.EXPERT_WEIGHTED, "attn.hook_out")

    def __init__(self, model: HookedMoE, result: TraceResult):
        self.model, self.tokens = model, model.to_tokens(PROMPT)
        self.answer = model.to_single_token(" b")
        noise = torch.randn(3, len(result.subject), model.cfg.d_model, generator=torch.Generator().manual_seed(1))
        self.noise = noise * result.noise_std
        self.subject = list(result.subject)
        with torch.no_grad():
            logits, self.clean = model.run_with_cache(self.tokens, names_filter=self.kept)
        self.score = self.probability(logits)

    def kept(self, name: str) -> bool:
        return name.endswith(self.wanted)

    def probability(self, logits: Tensor) -> float:
        return logits[0, -1].softmax(-1)[self.answer].item()

    def restored(self, draw: int, hooks: list[Any], cache: bool = False) -> Any:
        def corrupt(embeddings: Tensor, hook: Any) -> Tensor:
            embeddings = embeddings.clone()
            embeddings[0, self.subject] += self.noise[draw]
            return embeddings

        with torch.no_grad(), self.model.hooks(fwd_hooks=[("hook_embed", corrupt), *hooks]):
            if cache:
                return self.model.run_with_cache(self.tokens, names_filter=self.kept)[1]
            return self.probability(self.model(self.tokens))


def test_effects_are_those_of_full_passes_with_plain_hooks(model: HookedMoE, result: TraceResult):
    naive = Naive(model, result)
    assert abs(result.clean - naive.score) <= CLOSE
    assert result.clean > 0.5, "the model knows the answer"
    assert result.n == 3
    for draw in range(3):
        floor = naive.restored(draw, [])
        assert abs(result.corrupted[draw].item() - floor) <= CLOSE
        assert floor < result.clean - 0.1, "the noise hurts"
        for site, hook in (("resid", names.RESID_POST), ("attn", names.ATTN_OUT), ("mlp", names.BLOCK_MLP_OUT)):
            for layer, pos in ((0, result.subject[-1]), (3, len(result.tokens) - 1), (4, result.subject[0])):
                name = names.block(hook, layer)

                def put(value: Tensor, hook: Any, name: str = name, pos: int = pos) -> Tensor:
                    value = value.clone()
                    value[0, pos] = naive.clean[name][0, pos]
                    return value

                effect = naive.restored(draw, [(name, put)]) - floor
                assert abs(result.sites[site].values[draw, layer, pos].item() - effect) <= CLOSE


def test_experts_and_coalitions_are_restored_by_id(model: HookedMoE, result: TraceResult):
    naive, draw, place = Naive(model, result), 1, result.at[0]
    floor, cache = naive.restored(draw, []), naive.restored(draw, [], cache=True)
    seen = 0
    for row, layer in enumerate(model.moe_layers):

        def by_id(run: Any, layer: int = layer) -> Tensor:
            dense = torch.zeros(model.n_experts, model.cfg.d_model, dtype=torch.float64)
            dense[run["expert_indices", layer][0, place]] = run["expert_weighted", layer][0, place]
            return dense

        clean, here = by_id(naive.clean), by_id(cache)
        order = naive.clean["expert_indices", layer][0, place].tolist()
        groups = [("coalition", size, order[:size]) for size in (1, 3, 6)]
        groups += [
            ("expert", expert, [expert]) for expert in (order[0], int(cache["expert_indices", layer][0, place, 0]))
        ]
        for site, where, experts in groups:

            def add(value: Tensor, hook: Any, experts: list[int] = experts, delta: Tensor = clean - here) -> Tensor:
                value = value.clone()
                value[0, place] += delta[experts].sum(0)
                return value

            effect = naive.restored(draw, [(names.mlp(names.ROUTED_OUT, layer), add)]) - floor
            column = where - 1 if site == "coalition" else where
            assert abs(result.sites[site].values[draw, row, column].item() - effect) <= CLOSE
            seen += abs(effect) > 1e-6
    assert seen > 10


def test_identities(result: TraceResult):
    resid = result.sites["resid"]
    assert (resid.values[:, -1, -1] + result.corrupted - result.clean).abs().max() <= CLOSE, "the end restores all"
    assert not resid.values[:, -1, :-1].any(), "and nothing else of the last block is read"
    before = resid.values[:, :, : result.subject[0]]
    assert (before.abs() <= CLOSE).all(), "nothing is corrupted before the subject"
    unused = result.sites["expert"].values.abs().sum((0, 1)) == 0
    assert unused.any()
    assert not unused.all()


def test_intervals_are_those_of_sources_and_need_ten_draws(result: TraceResult):
    frame: Any = result.to_frame()
    assert frame[["low", "high"]].isna().all(axis=None), "three draws say too little of how much draws differ"
    assert set(frame["site"]) == {"resid", "attn", "mlp", "expert", "coalition"}
    assert (frame["n"] == 3).all()
    values = torch.randn(MIN_SOURCES, 2, 3, dtype=torch.float64)
    low, high = SiteEffects(values, {"layer": (0, 1), "pos": (0, 1, 2)}).interval
    one = bootstrap(lambda times: times @ values[:, 1, 2] / MIN_SOURCES, torch.ones(MIN_SOURCES))
    assert one is not None
    assert (float(low[1, 2]), float(high[1, 2])) == pytest.approx((one.low, one.high), abs=CLOSE)
    assert (low < values.mean(0)).all()
    assert (values.mean(0) < high).all()


def test_seeds_foils_positions_and_frozen_routing(model: HookedMoE, result: TraceResult):
    again = trace(model, PROMPT, list(result.subject), " b", draws=3, seed=1, batch_size=5)
    assert all((again.sites[s].values - result.sites[s].values).abs().max() <= CLOSE for s in result.sites)
    other = trace(model, PROMPT, ", b", " b", draws=3, seed=2)
    assert not torch.equal(other.corrupted, result.corrupted)
    fourth = 4 - model.to_tokens(PROMPT).shape[1]  # counted from the end
    foiled = trace(model, PROMPT, ", b", " b", foil=" c", draws=2, at=[3, fourth], routing="frozen")
    assert foiled.score == "logit difference"
    with torch.no_grad():
        logits = model(PROMPT)[0, -1]
    expected = logits[model.to_single_token(" b")] - logits[model.to_single_token(" c")]
    assert foiled.clean == pytest.approx(expected.item(), abs=1e-10)
    assert foiled.at == (3, 4)


@pytest.mark.typed
def test_results_go_to_files(tmp_path: Path, result: TraceResult):
    result.save(tmp_path / "trace.safetensors")
    loaded = TraceResult.load(tmp_path / "trace.safetensors")
    assert loaded.to_frame().equals(result.to_frame())
    assert loaded.tokens == result.tokens
    assert repr(loaded) == repr(result)
    assert repr(loaded).endswith("3 draws; resid, attn, mlp, expert, coalition)")


@pytest.mark.typed
@pytest.mark.slow
def test_the_guide_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "patching.md"), "patching.md", "exec"), values)
    assert capsys.readouterr().out
    # restoring the whole residual stream restores the answer, but for float32 rounding over a small total effect
    assert values["resid"].effect.max() == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "trace.html").is_file()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "France"}, "the subject 'France' is not in the prompt"),
        ({"subject": [40]}, "positions: got 40; expected numbers from 0 to"),
        ({"subject": []}, r"positions: got \[\]"),
        ({"subject": [False, True]}, r"positions: got \[False, True\]"),
        ({"at": [False, True]}, r"positions: got \[False, True\]"),
        ({"subject": 40}, "positions: got 40; expected numbers from 0 to"),
        ({"prompt": [PROMPT]}, "expected a text"),
        ({"answer": " banana split"}, r"the answer ' banana split' is \d+ tokens, .*expected one"),
        ({"answer": 5000}, "the answer is token 5000; expected an id from 0 to 4095"),
        ({"foil": ""}, "the foil '' is 0 tokens"),
        ({"foil": " b"}, "answer and foil are one token"),
        ({"draws": 0}, "draws is 0; expected a whole number from 1"),
        ({"noise": 0}, "noise=0"),
        ({"level": 1.0}, r"level=1\.0"),
        ({"at": [99]}, "positions: got 99"),
        ({"at": [-99]}, "positions: got -99"),
        ({"routing": "loose"}, "routing is 'loose'"),
        ({"prompt": PROMPT + " b" * 600, "subject": 1}, "the model's context is"),
    ],
)
def test_bad_input_is_named(model: HookedMoE, changes: dict[str, Any], message: str):
    call: dict[str, Any] = {"prompt": PROMPT, "subject": ", b", "answer": " b", "draws": 1, **changes}
    with untouched(model), pytest.raises(InputError, match=message):
        trace(model, **call)


def test_noise_is_that_of_the_stream_however_one_function_is_spelled(model: HookedMoE):
    """Granite multiplies after its embedding: the matrix alone says nothing of what the blocks read."""

    def traced(factor: float, matrix: float) -> TraceResult:
        hf: Any = build_family("granitemoe", vocab_size=len(model.W_E), embedding_multiplier=factor)
        with torch.no_grad():
            hf.get_input_embeddings().weight.mul_(matrix)
        return trace(HookedMoE.from_hf(hf, model.tokenizer, check=False), PROMPT, ", b", " b", draws=2)

    one, other = traced(12.0, 1.0), traced(1.0, 12.0)
    assert one.noise_std == pytest.approx(other.noise_std, rel=1e-6)
    for site, effects in one.sites.items():
        assert torch.allclose(effects.values, other.sites[site].values, atol=1e-5), site
    assert one.noise_std > 10 * traced(1.0, 1.0).noise_std


@pytest.mark.parametrize(("model_type", "by"), [("granitemoe", 2.5), ("gemma4_text", 40**0.5), ("mixtral", 1.0)])
def test_the_embeddings_deviation_is_that_of_the_hook(model_type: str, by: float):
    hooked = HookedMoE.from_hf(build_family(model_type), check=False)
    every = torch.arange(len(hooked.W_E))[:, None]
    with torch.no_grad(), untouched(hooked):
        _, cache = hooked.run_with_cache(every, names_filter="hook_embed", stop_at_layer=1)
        found = embedding_deviation(hooked, at_once=7)
    assert found == pytest.approx(cache["hook_embed"].double().std().item(), rel=1e-6)
    assert found == pytest.approx(by * hooked.W_E.double().std().item(), rel=1e-6)
