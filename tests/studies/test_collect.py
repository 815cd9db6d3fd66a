"""What `collect` saves: every token at its place, single experts' rows, and nothing that was changed or lost since."""

import contextlib
import shutil
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open

from moe_lens import HookedMoE
from moe_lens.data import Domain, Reading
from moe_lens.errors import InputError
from moe_lens.studies import Collected, RoutingStudy, collect, run
from moe_lens.studies.collect_activations import _narrowed as narrowed
from moe_lens.studies.collect_activations import hook_points
from tests.studies.tiny import domain, passages, tiny_model

READING = Reading(tokens=None, context=24, shard_tokens=100)
EXPERTS = "blocks.1.mlp.experts.{}.{}"


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


def test_positions_are_places_among_the_texts_own_ids(model, tmp_path):
    end = model.tokenizer.eos_token
    text = f"one two{end}three four{end}{end}five six " * 6
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    shard = next(collect(model, {"d": [text]}, tmp_path / "c", reading=Reading(tokens=None, context=9)).shards())
    opened = shard["token"] == model.tokenizer.bos_token_id
    assert int((~shard["counted"]).sum()) == int(opened.sum()) + ids.count(model.tokenizer.eos_token_id)
    places = shard["position"][~opened]
    assert sorted(places.tolist()) == list(range(len(ids)))  # also behind special tokens inside the text
    assert [ids[place] for place in places.tolist()] == shard["token"][~opened].tolist()
    after = opened.nonzero()[:, 0] + 1
    assert torch.equal(shard["position"][after], shard["position"][opened])


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.typed)])
def test_single_experts_keep_their_rows_only(model, packed, tmp_path):
    reading = Reading(tokens=None, context=24, shard_tokens=100, packed=packed)
    hooks = ["blocks.1.mlp.experts.*.hook_out", "blocks.1.mlp.experts.2.hook_post", "blocks.1.mlp.hook_expert_out"]
    made = collect(model, domain("d"), tmp_path / "c", reading=reading, hooks=hooks, batch_tokens=60)
    assert len(made.manifest["shards"]) > 2
    row = model.moe_layers.index(1)
    for shard in made.shards():
        chosen = shard["indices"][:, row].long()
        for expert in range(model.n_experts):
            token, rank = (shard[EXPERTS.format(expert, what)].long() for what in ("token", "rank"))
            assert torch.equal(token, (chosen == expert).any(-1).nonzero()[:, 0])
            assert bool((chosen[token, rank] == expert).all())
            there = shard["blocks.1.mlp.hook_expert_out"][token, rank]
            assert torch.equal(shard[EXPERTS.format(expert, "hook_out")], there)
        assert shard[EXPERTS.format(2, "hook_post")].shape[0] == int((chosen == 2).sum())
    # As a dataset: nothing where the expert got nothing.
    shard, names = next(made.shards()), [EXPERTS.format(e, "hook_out") for e in range(model.n_experts)]
    for at, found in zip(range(5), made.dataset(), strict=False):
        assert {e for e, name in enumerate(names) if found[name] is not None} == set(shard["indices"][at, row].tolist())
    with pytest.raises(InputError, match="has a row for each token"):
        collect(model, domain("d"), tmp_path / "p", hooks=hooks, kind="parquet")
    with pytest.raises(InputError, match="no such hook point"):
        collect(model, domain("d"), tmp_path / "n", hooks=["blocks.1.mlp.experts.99.hook_out"])
    found = hook_points(model, ["blocks.1.hook_*"])
    assert "blocks.1.hook_resid_mid" in found and "blocks.1.hook_mlp_in" in model.hook_dict
    assert "blocks.1.hook_mlp_in" not in found, "it never fires, and a pattern does not ask for it"
    with pytest.raises(InputError, match="use_hook_mlp_in is False"):
        hook_points(model, ["blocks.1.hook_mlp_in"])


def test_a_pattern_finds_the_same_hooks_whatever_was_asked_before(model, tmp_path):
    model.expert_hooks(1, 0)
    made = collect(model, domain("d"), tmp_path / "c", reading=READING, hooks=["blocks.1.mlp.*hook_out"])
    hooks = made.manifest["plan"]["settings"]["hooks"]
    assert "blocks.1.mlp.hook_out" in hooks and not [name for name in hooks if ".experts." in name]


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_layers_are_labelled(model, kind, tmp_path):
    made = collect(model, domain("d"), str(tmp_path / "c"), reading=READING, kind=kind)
    assert made.layers == tuple(model.moe_layers) and len(made.layers) == next(made.shards())["indices"].shape[1]
    path = made.folder / made.manifest["shards"][0]["file"]
    if kind == "parquet":
        told = (pyarrow.parquet.read_schema(path).metadata or {})[b"moe_lens"].decode()
    else:
        with safe_open(path, "pt") as file:
            told = file.metadata()["moe_lens"]
    assert f'"layers": {list(model.moe_layers)}' in told


def test_ids_and_truth_values_are_kept_as_they_are(model, tmp_path):
    hooks, point = ["blocks.1.mlp.hook_*"], "blocks.1.mlp.hook_expert_indices"
    how: Any = {"reading": READING, "dtype": torch.bfloat16}

    plain = next(collect(model, domain("d"), tmp_path / "a", hooks=hooks, **how).shards())
    assert plain["blocks.1.mlp.hook_expert_kept"].dtype == torch.bool
    row = model.moe_layers.index(1)
    assert torch.equal(plain[point], plain["indices"][:, row].to(plain[point].dtype))
    # As of a model with more experts than bfloat16 tells apart.
    found = narrowed("ids", plain[point] + 1001, torch.bfloat16)
    assert torch.equal(found - 1001, plain[point]) and not torch.equal(found.bfloat16().long(), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_both_formats_hold_the_same_bits(model, dtype, tmp_path):
    hooks = ["blocks.1.mlp.hook_expert_out", "blocks.1.mlp.hook_expert_indices"]
    how: Any = {"reading": READING, "hooks": hooks, "dtype": dtype}
    one, other = (
        next(collect(model, domain("d"), tmp_path / kind, kind=kind, **how).shards())
        for kind in ("safetensors", "parquet")
    )
    assert one.keys() == other.keys() and one[hooks[0]].dtype == dtype
    for name, value in one.items():
        assert other[name].dtype == value.dtype and torch.equal(other[name], value), name


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_what_was_changed_since_is_not_read(model, kind, tmp_path):
    out = tmp_path / "c"
    made = collect(model, domain("d"), out, reading=READING, kind=kind)
    files = [out / shard["file"] for shard in made.manifest["shards"]]
    shutil.copyfile(files[0], files[1])
    reading = Collected.load(out).shards()
    next(reading)
    with pytest.raises(InputError, match=f"{files[1].name}: is not as collect wrote it"):
        next(reading)
    with pytest.raises(InputError, match="is not as collect wrote it"):
        list(Collected.load(out).dataset())
    files[0].unlink()
    with pytest.raises(InputError, match=f"{files[0].name}: cannot be read"):
        next(made.shards())
    with pytest.raises(InputError, match=f"{files[0].name} is not there"):
        Collected.load(out)
    documents = made.documents()
    documents.assign(source="another").to_parquet(out / "documents.parquet", index=False)
    with pytest.raises(InputError, match=r"documents.parquet: is not as collect"):
        made.documents()
    with pytest.raises(InputError, match="has no domain 'x'; it has d"):
        next(made.shards("x"))


def test_progress_that_vanishes_is_said_and_nothing_is_dropped(model, tmp_path):
    out, unfinished = tmp_path / "c", tmp_path / "c.unfinished"
    whole = collect(model, domain("d"), tmp_path / "whole", reading=READING).n_tokens
    seen = 0

    def lose(what: str, tokens: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            shutil.rmtree(unfinished)

    with pytest.raises(InputError, match=r"c.unfinished: vanished while it was being filled"):
        collect(model, domain("d"), out, reading=READING, watch=lose)
    assert not out.exists() and not unfinished.exists()
    # One shard of several is made again, wherever it stood.
    for name in ("00-000-000001.json", "00-000-000000.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            seen = 0

            def stop(what: str, tokens: int) -> None:
                nonlocal seen
                seen += 1
                if seen == 3:
                    raise KeyboardInterrupt

            collect(model, domain("d"), out, reading=READING, watch=stop)
        (unfinished / name).unlink()
        assert collect(model, domain("d"), out, reading=READING).n_tokens == whole
        shutil.rmtree(out)


def test_a_file_system_without_links_will_do(model, tmp_path, monkeypatch):
    def no_links(*arguments: object) -> None:  # noqa: ARG001
        raise PermissionError(1, "Operation not permitted")

    whole = collect(model, domain("d"), tmp_path / "a", reading=READING)
    monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    other = collect(model, domain("d"), tmp_path / "b", reading=READING)
    assert [one["digest"] for one in other.manifest["shards"]] == [one["digest"] for one in whole.manifest["shards"]]
    assert sum(len(shard["token"]) for shard in other.shards()) == whole.n_tokens > 0


def test_texts_by_name_are_domains(model, tmp_path):
    texts = [row["text"] for row in passages(n=8)]
    made = collect(model, {"a": texts, "b": texts[:4]}, tmp_path / "c", reading=READING)
    assert [one["name"] for one in made.manifest["plan"]["domains"]] == ["a", "b"]
    assert set(made.documents()["domain"]) == {"a", "b"}
    same = collect(model, [Domain.of("a", texts), Domain.of("b", texts[:4])], tmp_path / "c", reading=READING)
    assert same.manifest == made.manifest


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float16"])
def test_numbers_are_kept_as_numbers(dtype, tmp_path):
    with pytest.raises(InputError, match="expected a floating-point dtype"):
        collect(tiny_model(), domain("d", n=2, sources=2), tmp_path / "c", dtype=dtype)


def test_a_text_that_opens_itself_has_its_own_first_place(model, tmp_path):
    text = f"{model.tokenizer.bos_token}one two three four five six seven eight nine ten"
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    assert ids[0] == model.own_ids("one")[0][0] and model.own_ids(text)[1] == ids[1:]
    shard = next(collect(model, {"d": [text]}, tmp_path / "c", reading=Reading(tokens=None, context=5)).shards())
    added = (shard["token"] == ids[0]) & (torch.arange(len(shard["token"])) > 0)  # before the later windows
    assert int(added.sum()) >= 2
    assert [ids[place] for place in shard["position"][~added].tolist()] == shard["token"][~added].tolist()
    assert torch.equal(shard["position"][added.nonzero()[:, 0] + 1], shard["position"][added])


def test_a_number_that_the_dtype_cannot_hold_is_an_error(model, tmp_path):
    how = {"reading": READING, "hooks": ["blocks.1.hook_resid_post", EXPERTS.format(2, "hook_out")]}
    for name, dtype in (("blocks.1.hook_resid_post", torch.float16), (how["hooks"][1], torch.float8_e4m3fn)):
        with (
            model.hooks(fwd_hooks=[(name, lambda value, hook: value * 1e9)]),
            pytest.raises(InputError, match=f"{name} reaches .*e.*, and float.* holds .* at most; choose bfloat16"),
        ):
            collect(model, domain("d"), tmp_path / "c", dtype=dtype, **{**how, "hooks": [name]})
        shutil.rmtree(tmp_path / "c.unfinished", ignore_errors=True)
    made = collect(model, domain("d"), tmp_path / "c", dtype=torch.float16, **how)
    assert all(bool(value.isfinite().all()) for shard in made.shards() for value in shard.values())


def test_what_was_begun_without_hooks_is_not_gone_on_with_under_them(model, tmp_path):
    def stop(what: str, tokens: int) -> None:
        raise KeyboardInterrupt

    def begin(folder: str, **how: Any) -> Any:
        return collect(model, domain("d"), tmp_path / folder, reading=READING, **how)

    with pytest.raises(KeyboardInterrupt):
        begin("c", watch=stop)
    with model.ablate({1: [2]}), pytest.raises(InputError, match=r"other work – model.hooks: nothing there, \["):
        begin("c")
    with model.ablate({1: [2]}), pytest.raises(KeyboardInterrupt):
        begin("a", watch=stop)
    for other in (model.ablate({1: [3]}), model.keep_top(1), contextlib.nullcontext()):
        with other, pytest.raises(InputError, match="other work – model.hooks: "):
            begin("a")
    with model.ablate({1: [2]}):
        resumed, whole = begin("a"), begin("whole")
    assert all(torch.equal(one["weights"], other["weights"]) for one, other in zip(resumed.shards(), whole.shards()))  # noqa: B905
    clean = begin("c")
    assert not all(torch.equal(one["weights"], other["weights"]) for one, other in zip(clean.shards(), whole.shards()))  # noqa: B905


def test_tokens_with_different_numbers_of_experts_are_refused(model, tmp_path):
    with model.use_experts(2):
        assert next(iter(collect(model, domain("d"), tmp_path / "two").shards()))["indices"].shape[-1] == 2
    with model.use_experts(mass=0.5), pytest.raises(InputError, match="^tokens have different numbers of experts"):
        collect(model, domain("d"), tmp_path / "any")
    assert not (tmp_path / "any").exists()


def test_what_is_given_by_mistake_is_said(model, tmp_path):
    wrong: list[tuple[Any, Any, str]] = [
        (model, {"tokens": 64}, "reading is {'tokens': 64}; expected a Reading, or None"),
        (model.original_model, None, "model is a .*; expected a HookedMoE"),
        ("tiny-deepseekmoe", None, "model is 'tiny-deepseekmoe'; expected a HookedMoE"),
    ]
    for given, reading, message in wrong:
        with pytest.raises(InputError, match=message):
            collect(given, domain("d"), tmp_path / "c", reading=reading)
    for study in ("routing", RoutingStudy):
        with pytest.raises(InputError, match="; expected a Study"):
            run(study, model, domain("d"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"passages is \('x text',\); expected a Passage \(what Domain.of makes"):
        Domain("d", ("x text",))  # pyright: ignore[reportArgumentType]


def test_a_study_notes_the_hooks_that_it_was_made_under(model, tmp_path):
    small = Reading(tokens=60, context=24)
    run(RoutingStudy(), model, domain("d"), reading=small, out=tmp_path / "s")
    with model.ablate({1: [2]}):
        with pytest.raises(InputError, match="model.hooks: nothing there"):
            run(RoutingStudy(), model, domain("d"), reading=small, out=tmp_path / "s")
        made = run(RoutingStudy(), model, domain("d"), reading=small)
    assert "ablate" in made.manifest["plan"]["model"]["hooks"][0]
    with (tmp_path / "log").open("w") as log:
        seen = [("blocks.1.hook_resid_post", lambda value, hook, log=log: None)]
        with model.hooks(fwd_hooks=seen), pytest.raises(InputError, match="a TextIOWrapper has no value"):
            run(RoutingStudy(), model, domain("d"), reading=small, out=tmp_path / "other")
        with model.hooks(fwd_hooks=seen):
            run(RoutingStudy(), model, domain("d"), reading=small)  # of what is not kept, nothing can be mixed
