"""Families that bypass transformers' experts interface: what is particular to each, through the whole package."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, names
from moe_lens.errors import HookError, InputError, UnsupportedModelError
from moe_lens.interventions.attribution import expert_attribution
from moe_lens.interventions.metrics import Logit
from moe_lens.interventions.patching import patch
from moe_lens.lenses.expert_writing import expert_vocabulary
from moe_lens.lenses.router_directions import router_geometry
from moe_lens.model.experts.nonstandard_experts import DbrxExperts
from moe_lens.stats import ImportanceStats
from tests.matrix.configs import build, tokens
from tests.wrapped import GATED

BYPASSING = ("dbrx", "jetmoe", "llama4_text", "longcat_flash", "step3p7")
METRIC = Logit(5)
EVERYWHERE = torch.ones(2, 12, dtype=torch.bool)


@cache
def model_of(model_type: str) -> HookedMoE:
    return HookedMoE.from_hf(build(model_type)).requires_grad_(False)


def run(model: Any, hooks: Any = (), ids: Tensor | None = None) -> Tensor:
    return model.run_with_hooks(tokens() if ids is None else ids, fwd_hooks=list(hooks))


def cached(model: Any, ids: Tensor | None = None) -> Any:
    return model.run_with_cache(tokens() if ids is None else ids, names_filter=lambda name: not name.endswith(GATED))[1]


def close(ours: Tensor, theirs: Tensor, bound: float = 2e-5) -> None:
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


# --- all of them ---


@pytest.mark.parametrize("model_type", BYPASSING)
def test_logits_are_the_models_own_to_the_bit_however_many_rows_an_expert_gets(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a tensor is rounded otherwise than its middle, so that it matters where an expert's rows end."""
    plain, model = build(model_type), model_of(model_type)
    ids = [tokens(batch, pos, seed=pos) for batch, pos in [(1, 5), (1, 11), (2, 7), (3, 9), (2, 31)]]

    def agree() -> list[bool]:
        with torch.no_grad():
            return [torch.equal(model(of), plain(of).logits) for of in ids]

    assert all(agree())
    if model_type == "dbrx":  # the one whose branches are no views, in which rows end within a tensor
        monkeypatch.setattr(DbrxExperts, "activate", lambda self, projected, rows: self.activate_one(projected))
        assert not all(agree())


@pytest.mark.parametrize("matrix", ["W_router", "W_gate", "W_in", "W_out"])
@pytest.mark.parametrize("model_type", BYPASSING)
def test_matrices_are_views_that_edit_the_model_and_no_copies(model_type: str, matrix: str) -> None:
    model = model_of(model_type)
    layer = model.moe_layers[-1]
    indices = model.routing(tokens()).indices[-1].flatten()
    expert = int(indices[indices < model.n_experts - model.n_identity_experts].mode().values)
    view = getattr(model, matrix)[layer, expert]
    storages = {p.untyped_storage().data_ptr() for p in model.original_model.parameters()}
    assert view.untyped_storage().data_ptr() in storages
    plain, before = run(model), view.clone()
    view.mul_(1.5)
    edited = run(model)
    view.copy_(before)
    assert (edited - plain).abs().max() > 1e-3
    assert torch.equal(run(model), plain)


@pytest.mark.typed
@pytest.mark.parametrize("model_type", BYPASSING)
def test_any_expert_computes_what_it_gives_where_it_is_chosen(model_type: str) -> None:
    model = model_of(model_type)
    layer, kept = model.moe_layers[-1], cached(model)
    x, chosen = kept[names.mlp(names.MLP_IN, layer)], kept["expert_indices", layer]
    given = x[:, :, None].expand(*chosen.shape, -1)
    if model.family.weighs_input:
        given = given * kept["routing_weights", layer][..., None]
    out = model.expert_outputs(layer, given.flatten(0, 2), chosen.flatten()[:, None])
    close(out.view_as(given), kept["expert_out", layer])


def test_layers_on_disk_compute_the_same(tmp_path: Path) -> None:
    build("dbrx").save_pretrained(tmp_path / "model")
    whole = HookedMoE.from_pretrained(tmp_path / "model")
    places: dict[str, str] = {"lm_head": "cpu", **{f"transformer.{name}": "cpu" for name in ("wte", "norm_f")}}
    places |= {"transformer.rotary_emb": "cpu"}
    places |= {f"transformer.blocks.{layer}": "disk" if layer < 2 else "cpu" for layer in range(4)}
    split = HookedMoE.from_pretrained(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "off"))
    assert any(p.is_meta for p in split.original_model.parameters())
    hooks = [(names.mlp(names.EXPERT_OUT, 0), lambda value, hook: value * 2)]
    with torch.no_grad():
        assert torch.equal(split(tokens()), whole(tokens()))
        assert torch.equal(run(split, hooks), run(whole, hooks))


def test_other_experts_than_a_family_has_are_refused_by_name() -> None:
    hf: Any = build("dbrx")
    hf.transformer.blocks[1].ffn.experts.mlp.w2 = torch.nn.Parameter(torch.zeros(2, 2).to(torch.int8), False)
    with pytest.raises(UnsupportedModelError, match="DbrxExperts is not under transformers' experts contract"):
        HookedMoE.from_hf(hf)


# --- LongCat-Flash: identities ---


def test_identities_have_no_matrices_and_no_neurons_and_can_be_taken_out() -> None:
    model = model_of("longcat_flash")
    layer, first = 1, model.n_experts - model.n_identity_experts
    assert (model.n_experts, model.n_identity_experts) == (11, 3)
    for matrix in (model.W_gate, model.W_in, model.W_out):
        assert len(matrix[layer]) == first
        with pytest.raises(InputError, match=rf"\[1, expert\]: got {first}; expected numbers from 0 to 7"):
            matrix[layer, first]
    assert list(model.expert_hooks(layer, first)) == [names.expert("hook_out", layer, first)]
    with pytest.raises(HookError, match=rf"an identity expert has no neurons. There is blocks.1.*\.{first}\.hook_out$"):
        run(model, [(names.expert("hook_post", layer, first), lambda value, hook: value)])
    kept = cached(model)
    identical = kept["expert_indices", layer] >= first
    assert identical.any() and not identical.all()
    rows = kept["expert_out", layer], kept[names.mlp(names.MLP_IN, layer)][:, :, None]
    assert torch.equal(rows[0][identical], rows[1].expand_as(rows[0])[identical])
    assert not kept["expert_post", layer][identical].any()

    loud = identical[..., None] * 1e3  # edits of neurons that are not there
    assert torch.equal(run(model, [(names.mlp(names.EXPERT_POST, layer), lambda v, hook: v + loud)]), run(model))
    zeroed = run(
        model,
        [(names.mlp(names.EXPERT_WEIGHTED, layer), lambda v, hook: v.masked_fill(identical[..., None], 0))],
    )
    with model.ablate({layer: list(range(first, model.n_experts))}):
        close(model(tokens()), zeroed)
    doubled = run(model, [(names.expert("hook_out", layer, first), lambda value, hook: value * 2)])
    alone = (kept["expert_indices", layer] == first)[..., None]
    close(doubled, run(model, [(names.mlp(names.EXPERT_OUT, layer), lambda v, hook: torch.where(alone, v * 2, v))]))


def test_rows_of_identities_point_at_no_neurons() -> None:
    model = model_of("longcat_flash")
    frame = router_geometry(model, 1).to_frame()
    assert frame["own"].isna().tolist() == [False] * 8 + [True] * 3
    assert frame["others"].isna().tolist() == [False] * 8 + [True] * 3


def test_what_a_shortcut_adds_is_a_term_of_the_sum_and_can_be_attributed() -> None:
    model = model_of("longcat_flash")
    with pytest.raises(HookError, match="hook_resid_mid"):
        cached(model).partial_sum(1, ranks=[0])
    _, labels = cached(model).decompose_experts()
    assert labels[1:7] == ["0_attn", "0_dense", "0_attn_second", "0_dense_second", "0_rank_0", "0_rank_1"]
    kept = cached(model)
    stack, labels = kept.decompose_experts()
    logits = kept.logit_attrs(stack[labels.index("3_rank_1")][None], 5)[0, :, -1].mean()
    direct = expert_attribution(model, tokens(), METRIC, method="direct", unit="rank").values[3, 1].sum()
    assert abs(direct - logits) <= 1e-5
    exact = expert_attribution(model, tokens(), METRIC, method="knockout").values
    for layer in (0, 3):
        for expert in (2, 9):
            with model.ablate({layer: [expert]}):
                without = METRIC(model(tokens()))
            assert abs(exact[layer, expert] - (METRIC(run(model)) - without)) <= 1e-4


# --- Llama 4: weights before the expert ---


def test_sums_are_the_same_whichever_outputs_were_cached() -> None:
    model = model_of("llama4_text")
    layer = model.moe_layers[0]
    need = [names.block(names.RESID_MID, layer), names.mlp(names.EXPERT_INDICES, layer)]
    plain = [*need, names.mlp(names.EXPERT_OUT, layer), names.mlp(names.ROUTING_WEIGHTS, layer)]
    _, one = model.run_with_cache(tokens(), names_filter=plain)
    _, other = model.run_with_cache(tokens(), names_filter=[*need, names.mlp(names.EXPERT_WEIGHTED, layer)])
    sums = [kept.partial_sum(layer, ranks=[0, 2]).values for kept in (one, other)]
    assert torch.equal(*sums)
    broken = model_with(model, weighs_input=False)
    assert not torch.allclose(broken(lambda: one.partial_sum(layer, ranks=[0, 2]).values), sums[1])


def model_with(model: Any, **changes: Any) -> Any:
    """Run something with another row of the table: the negative control."""

    def with_row(compute: Any) -> Any:
        family = model.family
        model.__dict__["family"] = replace(family, **changes)
        try:
            return compute()
        finally:
            model.__dict__["family"] = family

    return with_row


def test_an_unselected_expert_reads_what_the_top_one_reads() -> None:
    model = model_of("llama4_text")
    layer, kept = model.moe_layers[0], cached(model)
    drawn = kept.selected_expert(layer, which := partial_sum_of("unselected")).expert
    x = kept[names.mlp(names.MLP_IN, layer)] * kept["routing_weights", layer][..., :1]
    with torch.no_grad():
        out = model.expert_outputs(layer, x, drawn[..., None]).squeeze(-2)
    close(kept.partial_sum(layer, which).values, out)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_ids_of_any_width_are_ids(dtype: torch.dtype) -> None:
    """torch reads bytes as a mask; eight tokens with one id each of eight experts fit one. gpt-oss's have biases."""
    model = model_of("gpt_oss")
    layer = model.moe_layers[0]
    x = cached(model)[names.mlp(names.MLP_IN, layer)].flatten(0, 1)[: model.n_experts]
    chosen = torch.arange(model.n_experts).roll(3)[:, None]
    right = model.expert_outputs(layer, x, chosen)
    assert torch.equal(model.expert_outputs(layer, x, chosen.to(dtype)), right)
    assert not torch.equal(right, model.expert_outputs(layer, x, chosen.roll(1, 0))), "a control"


def partial_sum_of(drawn: Any) -> Any:
    from moe_lens import PartialSum

    return PartialSum(drawn=drawn, residual="none", shared=False)


def test_importance_is_of_what_is_added() -> None:
    model = model_of("llama4_text")
    layer, kept = model.moe_layers[0], cached(model)

    def measure() -> Tensor:
        stats = ImportanceStats(model.moe_layers, model.n_experts)
        run(model, stats.hooks(model, EVERYWHERE))
        return stats.result().score("weighted_ean")[0]

    norms = kept["expert_weighted", layer].norm(dim=-1).flatten().double()
    added = torch.zeros(model.n_experts, dtype=torch.float64)
    added.index_add_(0, kept["expert_indices", layer].flatten(), norms)
    close(measure(), added)
    # A control: weighing once more is far off, not only by rounding.
    assert not torch.allclose(model_with(model, weighs_input=False)(measure), added, rtol=1e-2)


@pytest.mark.typed
@pytest.mark.parametrize("site", ["expert_out", "expert_weighted"])
def test_a_patched_output_is_that_edit_of_the_run(site: str) -> None:
    model = model_of("llama4_text")
    layer, clean, corrupted = model.moe_layers[0], tokens(), tokens(seed=2)
    source = cached(model, clean)[site, layer]
    name = names.mlp("hook_" + site, layer)

    def measure() -> float:
        return float(patch(model, clean, corrupted, site, METRIC, over=("layer",)).values[0])

    edited = float(METRIC(run(model, [(name, lambda value, hook: source)], corrupted)))
    assert measure() == pytest.approx(edited, abs=1e-5)
    if site == "expert_out":  # a control: weighing once more is a hundred times further off than what is allowed above
        assert model_with(model, weighs_input=False)(measure) != pytest.approx(edited, abs=1e-3)


def test_attribution_against_means_is_what_replacing_by_means_does() -> None:
    model = model_of("llama4_text")
    layer = model.moe_layers[-1]

    def measure() -> float:
        found = expert_attribution(
            model, tokens(), METRIC, method="knockout", unit="rank", baseline="mean", reference=tokens()
        )
        return float(found.values[-1, 0])

    with model.ablate(ranks=[0], layers=[layer], how="mean", reference=tokens()):
        without = float(METRIC(model(tokens())))
    assert measure() == pytest.approx(float(METRIC(run(model))) - without, abs=1e-5)
    # A control: weighing once more is a hundred times further off than that.
    assert model_with(model, weighs_input=False)(measure) != pytest.approx(
        float(METRIC(run(model))) - without, abs=1e-3
    )


def test_an_expert_s_strongest_inputs_are_where_it_adds_most() -> None:
    model = model_of("llama4_text")
    layer, kept = model.moe_layers[0], cached(model)
    chosen = kept["expert_indices", layer]
    expert = int(chosen.flatten().mode().values)
    found = expert_vocabulary(model, layer, expert, texts=tokens(), inputs=3)
    norms = kept["expert_weighted", layer].norm(dim=-1)[chosen == expert]
    assert [one.norm for one in found.inputs] == pytest.approx(norms.sort(descending=True).values[:3].tolist())


def test_weights_of_zero_take_an_expert_out() -> None:
    model = model_of("llama4_text")
    layer = model.moe_layers[0]
    zero = [(names.mlp(names.ROUTING_WEIGHTS, layer), lambda value, hook: value * 0)]
    nothing = [(names.mlp(names.ROUTED_OUT, layer), lambda value, hook: value * 0)]
    assert torch.equal(run(model, zero), run(model, nothing))


ROUTES: dict[str, Any] = {
    "forward": lambda model: model(tokens()),
    "hooks": lambda model: model.run_with_hooks(tokens(), fwd_hooks=[("hook_embed", lambda x, hook: x)]),
    "transformers' generation": lambda model: model.hf_generate(tokens(), max_new_tokens=1),
    "transformers' model": lambda model: model.original_model(tokens()),
}


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["mixtral", "axk1"])
def test_a_forward_that_is_put_into_what_it_calls_is_one_line(model_type: str) -> None:
    model: Any = HookedMoE.from_hf(build(model_type), check=False)
    before = model(tokens())
    inside = "self_attn", "input_layernorm", "mlp", *(("self_attn.o_proj",) if model_type == "mixtral" else ())
    for path in (*(f"model.layers.2.{part}" for part in inside), "model.embed_tokens", "model.norm", "lm_head"):
        module = model.original_model.get_submodule(path)
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
        for run in ROUTES.values():
            with pytest.raises(UnsupportedModelError, match=rf"^{path}: its forward was replaced"):
                run(model)
        del module.original_component.forward
        assert torch.equal(model(tokens()), before), "as the line says"

    def endless(x: Any, hook: Any) -> Any:
        return endless(x, hook)

    with pytest.raises(RecursionError):
        model.run_with_hooks(tokens(), fwd_hooks=[("hook_embed", endless)])


@pytest.mark.parametrize("route", ROUTES)
def test_forwards_that_call_one_another_from_before_wrapping_are_one_line(route: str) -> None:
    hf: Any = build("mixtral")
    first, last = (layer.input_layernorm for layer in (hf.model.layers[0], hf.model.layers[2]))
    first.forward = lambda x: hf.model.layers[2].input_layernorm(x)
    model = HookedMoE.from_hf(hf, check=False)
    ROUTES[route](model)  # negative control: this one ends
    last.forward = lambda x: hf.model.layers[0].input_layernorm(x)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.0\.input_layernorm: its forward was replaced by"):
        ROUTES[route](model)
