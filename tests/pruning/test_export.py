import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM

from moe_lens import HookedMoE
from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.pruning import Plan, export, plan
from moe_lens.pruning.export import disk_needed, folder_size
from moe_lens.pruning.merging import grouped
from moe_lens.pruning.prune_job import PruneSettings, prune
from tests.families import CONFIGS, build, tokens
from tests.pruning.smaller import by_hand, make_plan, whole
from tests.studies.tiny import TOKENIZER, domain

STAY = {0: (0, 1, 2, 5, 6, 7), 1: (0, 2, 3, 4, 5, 7), 2: (1, 2, 3, 4, 6, 7)}  # three of each group of four


def kept_of(model):
    return {layer: STAY[layer] for layer in model.moe_layers}


@pytest.fixture
def hooked():
    return HookedMoE.from_hf(build("olmoe"), check=False)


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_exported_checkpoints_are_the_smaller_model_in_plain_transformers(name, top_k, tmp_path):
    hooked = HookedMoE.from_hf(whole(name), check=False)
    kept = kept_of(hooked)
    expected = by_hand(name, kept, top_k)
    folder = export(hooked, make_plan(hooked, kept, top_k), tmp_path / "out")
    loader: Any = AutoModelForCausalLM
    loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(expected)
    with torch.no_grad():
        found, wanted = loaded(tokens()).logits, expected(tokens()).logits
        other = whole(name)(tokens()).logits
    assert torch.equal(found, wanted)
    assert (found - other).abs().max() > 0.01


def test_a_model_is_known_by_what_it_is_whatever_it_is_called(hooked, tmp_path):
    of, other = tmp_path / "of", build("olmoe")
    hooked.save_pretrained(of)
    shutil.copytree(of, tmp_path / "called otherwise")
    found = make_plan(HookedMoE.from_pretrained(of, check=False), kept_of(hooked), 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        again = HookedMoE.from_pretrained(tmp_path / "called otherwise", dtype=dtype, check=False)
        with pytest.warns(UserWarning, match="made of 'of' is used with 'called otherwise'"), found.preview(again):
            pass
    with pytest.warns(UserWarning, match="a fine-tune may differ elsewhere"):
        export(tmp_path / "called otherwise", found, tmp_path / "smaller")

    # Negative controls: of the same name and sizes, trained a little further; and a plan that knows nothing but a name.
    for parameter in other.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "elsewhere" / "of")
    trained = HookedMoE.from_pretrained(tmp_path / "elsewhere" / "of", check=False)
    with pytest.raises(InputError, match="for a model with other router weights than this one; .* 'of' and 'of'"):
        found.preview(trained).__enter__()
    with pytest.raises(InputError, match="for a model with other router weights than this one; .* 'of' and 'of'"):
        export(tmp_path / "elsewhere" / "of", found, tmp_path / "out")
    earlier = replace(found, model={key: value for key, value in found.model.items() if key != "routers"})
    earlier.save(tmp_path / "earlier")
    Plan.load(tmp_path / "earlier").preview(trained).__enter__()
    with pytest.raises(InputError, match="for a model with name 'of'; this one has 'called otherwise'"):
        Plan.load(tmp_path / "earlier").preview(again).__enter__()


def test_a_model_in_memory_is_left_as_it_was(hooked, tmp_path):
    before = hooked(tokens())
    export(hooked, make_plan(hooked, kept_of(hooked), 2), tmp_path / "out")
    assert torch.equal(hooked(tokens()), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_on_disk_is_pruned_shard_by_shard(tmp_path):
    HookedMoE.from_hf(build("qwen2_moe"), check=False).save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    hooked = HookedMoE.from_pretrained(tmp_path / "whole", check=False)
    plan = make_plan(hooked, kept_of(hooked), 2)
    export(str(tmp_path / "whole"), plan, tmp_path / "streamed")
    export(hooked, plan, tmp_path / "loaded")
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    stored = {}
    for file in sorted(set(index["weight_map"].values())):
        stored |= load_file(tmp_path / "streamed" / file)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens()).logits for name in ("streamed", "loaded")]
    assert torch.equal(*both)


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize(("before", "off"), [("_orig_mod.", ""), ("module.", ""), ("", "model.")])
def test_names_that_loading_knows_are_pruned_and_written_so_that_transformers_knows_them(before, off, merges, tmp_path):
    """As saved from torch.compile, from DataParallel, and from the base class; transformers reads the last itself."""
    build("qwen3_moe").save_pretrained(tmp_path / "own")
    hooked = HookedMoE.from_pretrained(tmp_path / "own", check=False)
    plan = make_plan(hooked, kept_of(hooked), 2)
    if merges:
        plan = grouped(plan, torch.eye(8).expand(len(plan.layers), 8, 8), torch.ones(len(plan.layers), 8))
    other = shutil.copytree(tmp_path / "own", tmp_path / "other" / "own")
    stored = load_file(tmp_path / "own" / "model.safetensors")
    stored |= {"model.layers.9.mlp.gate.weight": torch.ones(2)}  # of a layer that predicts several tokens ahead
    stored = {before + key.removeprefix(off): value for key, value in stored.items()}
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    loader: Any = AutoModelForCausalLM
    with pytest.warns(UserWarning, match=rf"layers {'' if off else 'model.'}layers\.9 of the checkpoint predict"):
        export(str(other), plan, tmp_path / "out")
    export(str(tmp_path / "own"), plan, tmp_path / "wanted")
    loaded, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(tokens()).logits, loader.from_pretrained(tmp_path / "wanted")(tokens()).logits)


def test_a_single_large_file_is_written_as_several(tmp_path, monkeypatch):
    """So that no more than one of them is in memory."""
    build("qwen2_moe").save_pretrained(tmp_path / "whole")
    assert [file.name for file in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    hooked = HookedMoE.from_pretrained(tmp_path / "whole", check=False)
    plan = make_plan(hooked, kept_of(hooked), 2)
    export(str(tmp_path / "whole"), plan, tmp_path / "one")
    monkeypatch.setattr(sys.modules["moe_lens.pruning.export"], "_SHARD", 20_000)
    export(str(tmp_path / "whole"), plan, tmp_path / "several")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    shards = [load_file(file) for file in sorted((tmp_path / "several").glob("*.safetensors"))]
    assert len(shards) > 3 and {name: 1 for shard in shards for name in shard}.keys() == whole.keys()
    assert all(len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= 20_000 for shard in shards)
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens()).logits for name in ("one", "several")]
    assert torch.equal(*both)


def test_the_rest_of_a_checkpoint_comes_along_and_code_does_not(tmp_path):
    build("olmoe").save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    (tmp_path / "whole" / "modeling.py").write_text("raise SystemExit")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.X"}}))
    hooked = HookedMoE.from_hf(build("olmoe"), name=str(tmp_path / "whole"), check=False)
    folder = export(
        str(tmp_path / "whole"),
        make_plan(hooked, kept_of(hooked), 3),
        tmp_path / "out",
        measurements={"Perplexity": "12 | 13"},
    )
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= names and "modeling.py" not in names
    written = json.loads((folder / "config.json").read_text())
    assert written == {**config, "num_experts": 6}
    card = (folder / "README.md").read_text()
    assert "6 of 8 routed experts stay" in card and "12 | 13" in card and "| 1 | 0, 2, 3, 4, 5, 7 |" in card


def test_folders_that_hold_something_are_refused(hooked, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        export(hooked, make_plan(hooked, kept_of(hooked), 2), tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_an_empty_folder_will_do(hooked, tmp_path):
    (tmp_path / "out").mkdir()
    export(hooked, make_plan(hooked, kept_of(hooked), 2), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_uneven_plans_are_refused_and_their_uniform_fallback_works(hooked, tmp_path):
    uneven = make_plan(hooked, {0: (0, 1, 2), 1: (3, 4, 5, 6, 7), 2: (1, 2, 5, 7)}, 2)
    with pytest.raises(UnsupportedModelError, match=r"\{0: 3, 1: 5, 2: 4\}.*plan.uniform\(\)"):
        export(hooked, uneven, tmp_path / "out")
    export(hooked, uneven.uniform(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 4


def test_layers_with_different_numbers_of_active_experts_are_refused(hooked, tmp_path):
    plan = replace(make_plan(hooked, kept_of(hooked), 2), fewer={1: 1})
    with pytest.raises(UnsupportedModelError, match=r"\{0: 2, 1: 1, 2: 2\}.*has one number for all"):
        export(hooked, plan, tmp_path / "out")


@pytest.mark.slow
def test_checkpoints_load_where_moe_lens_was_never_imported(tmp_path):
    expected = {}
    for name in ("olmoe", "qwen2_moe", "mixtral", "deepseek_v2"):
        hooked = HookedMoE.from_hf(whole(name), check=False)
        plan = make_plan(hooked, kept_of(hooked), 2)
        with torch.no_grad(), plan.preview(hooked):
            expected[name] = hooked(tokens())
        export(hooked, plan, tmp_path / name)
    save_file({"tokens": tokens()}, tmp_path / "tokens")
    code = f"""
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file({str(tmp_path / "tokens")!r})["tokens"]
with torch.no_grad():
    load = AutoModelForCausalLM.from_pretrained
    found = {{name: load({str(tmp_path)!r} + "/" + name)(tokens).logits for name in {list(expected)!r}}}
assert not any(name.startswith("moe_lens") for name in sys.modules)
save_file({{n: logits.contiguous() for n, logits in found.items()}}, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    for name, logits in load_file(tmp_path / "logits").items():
        assert (logits - expected[name]).abs().max() <= 1e-5, name


def test_groups_must_stay_equally_large(tmp_path):
    hooked = HookedMoE.from_hf(build("deepseek_v3"), check=False)
    plan = make_plan(hooked, {1: (0, 1, 2, 3), 2: (0, 2, 4, 6)}, 2)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 would keep \[2, 2, 0, 0\] experts in the 4 groups"):
        export(hooked, plan, tmp_path / "out")


def test_a_model_whose_router_chooses_from_groups_is_pruned_to_the_best_of_each(tmp_path):
    """Of 16 experts in 4 groups 8 stay, two in each; plain transformers computes what the preview does."""
    build("deepseek_v3", n_routed_experts=16, vocab_size=4096).save_pretrained(tmp_path / "whole")
    load_tokenizer(str(TOKENIZER)).save_pretrained(tmp_path / "whole")
    hooked = HookedMoE.from_pretrained(tmp_path / "whole", check=False).requires_grad_(False)
    texts = domain("some")
    asked: dict[str, Any] = {"merged": False, "budget": "layer", "uniform": False, "domain": None, "top_k": None}
    settings = PruneSettings(
        str(tmp_path / "whole"), 0.5, "frequency", **asked, compare=("random",), tokens=256, seed=0, context=16
    )
    done = prune(hooked, (texts,), settings, tmp_path / "out")
    for kept in done.plan.kept:
        assert [sum(expert // 4 == group for expert in kept) for group in range(4)] == [2, 2, 2, 2]
    ids = tokens()
    with torch.no_grad(), done.plan.preview(hooked):
        expected = hooked(ids)
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits - expected).abs().max() <= 1e-5
    alone = plan(done.scores, 0.5)
    assert alone.kept != done.plan.kept, "a control: the best of a layer are not as many in each group"
    few = replace(settings, keep=0.25)
    with pytest.raises(UnsupportedModelError, match=r"would keep \[1, 1, 1, 1\].*each needs at least 2"):
        prune(hooked, (texts,), few, tmp_path / "few", watch=lambda what: pytest.fail("before it scores"))


def test_groups_must_stay_large_enough_to_be_ranked(tmp_path):
    hooked = HookedMoE.from_hf(build("deepseek_v3"), check=False)
    plan = make_plan(hooked, {1: (0, 2, 4, 6), 2: (0, 2, 4, 6)}, 2)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 would keep \[1, 1, 1, 1\].*each needs at least 2"):
        export(hooked, plan, tmp_path / "out")
    one = HookedMoE.from_hf(build("deepseek_v3", n_group=1, topk_group=1), check=False)  # is ranked by two all the same
    with pytest.raises(UnsupportedModelError, match=r"layer 1 would keep \[1\] experts in the 1 groups"):
        export(one, make_plan(one, {1: (3,), 2: (5,)}, 1), tmp_path / "out")
    folder = export(one, make_plan(one, {1: (3, 4), 2: (5, 6)}, 1), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits.isfinite().all()


def test_plans_of_another_model_of_as_many_experts_are_refused(hooked, tmp_path):
    """Of one in memory and of a checkpoint, as the preview refuses them; the plan's own model is written."""
    called = tmp_path / hooked.cfg.model_name
    plan, other = make_plan(hooked, kept_of(hooked), 2), build("olmoe", num_experts_per_tok=2)
    other.save_pretrained(called)
    for model in (str(called), HookedMoE.from_hf(other, name=str(called), check=False)):
        with pytest.raises(InputError, match="the plan is for a model with top_k .*; this one has"):
            export(model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build("olmoe").save_pretrained(called)
    assert export(called, plan, tmp_path / "out").exists()


def test_checkpoints_without_the_plan_s_experts_and_other_families_are_refused(hooked, tmp_path):
    build("olmoe", num_experts=6).save_pretrained(tmp_path / "six")
    hooked.cfg.model_name = "six"
    plan = make_plan(hooked, kept_of(hooked), 2)
    with pytest.raises(InputError, match=r"8 experts in each of the layers \[0, 1, 2\].*\{0: 6, 1: 6, 2: 6\}"):
        export(str(tmp_path / "six"), plan, tmp_path / "out")
    config = json.loads((tmp_path / "six" / "config.json").read_text())
    (tmp_path / "six" / "config.json").write_text(json.dumps({**config, "model_type": "jamba"}))
    with pytest.raises(UnsupportedModelError, match="'jamba' cannot be written; supported: deepseek, "):
        export(str(tmp_path / "six"), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"ignore": ["lm_head", "model.layers.1.mlp.experts.5.up_proj"]}, "model.layers.1.mlp.experts.5.up_proj"),
        ({"dynamic": {r"-:.*\.experts\.5\..*": {}}}, r".*experts.*5.*"),
        ({"targets": ["re:.*experts.(3|5).down_proj"]}, r"re:.*experts"),
        ({"ignore": ["re:.*mlp.gate$"], "targets": [r"re:.*mlp\.experts\.\d+\.(gate|up)_proj", "experts.*"]}, None),
    ],
)
def test_a_packed_checkpoint_that_names_single_experts_is_refused(hooked, tmp_path, said, refused):
    """They would have other numbers."""
    build("olmoe").save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": said}))
    hooked.cfg.model_name = "whole"
    plan = make_plan(hooked, kept_of(hooked), 2)
    for ask in (disk_needed, lambda *told: export(told[0], plan, told[2])):
        if refused is None:
            ask(tmp_path / "whole", plan, tmp_path / "out")
            continue
        with pytest.raises(UnsupportedModelError, match=rf"names single experts \(.*{refused}.*writes it unpacked"):
            ask(tmp_path / "whole", plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_a_model_that_was_packed_is_refused_and_what_it_was_packed_from_is_pruned(saved, tmp_path):
    build("olmoe").save_pretrained(tmp_path / "packed")
    hooked = HookedMoE.from_pretrained(tmp_path / "packed", quantize="int8", check=False)
    plan = make_plan(hooked, kept_of(hooked), 2)
    if saved:
        hooked.save_pretrained(tmp_path / "saved" / "packed")
    with pytest.raises(UnsupportedModelError, match=r"packed by quantize='int8' .* prunes that"):
        export(str(tmp_path / "saved" / "packed") if saved else hooked, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(str(tmp_path / "packed"), plan, tmp_path / "out").exists()


def test_a_broken_checkpoint_or_a_full_disk_leaves_nothing_behind(hooked, tmp_path, monkeypatch):
    hooked.cfg.model_name = "whole"
    plan = make_plan(hooked, kept_of(hooked), 2)
    hooked.save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match="takes 0.00 GB, and 0.00 GB are free"):
        export(str(tmp_path / "whole"), plan, tmp_path / "out")
    with pytest.raises(InputError, match="takes 0.00 GB, and 0.00 GB are free"):
        disk_needed(tmp_path / "whole", plan, tmp_path / "out")
    monkeypatch.undo()
    export(str(tmp_path / "whole"), plan, tmp_path / "smaller")
    header = int.from_bytes((tmp_path / "smaller" / "model.safetensors").read_bytes()[:8], "little")
    assert disk_needed(tmp_path / "whole", plan, tmp_path / "out") == folder_size(tmp_path / "smaller") - header - 8
    shutil.rmtree(tmp_path / "smaller")
    stored = load((tmp_path / "whole" / "model.safetensors").read_bytes())
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        export(str(tmp_path / "whole"), plan, tmp_path / "out")
    whole_but = {name: value for name, value in stored.items() if ".layers.1.mlp.experts.4." not in name}
    save_file(whole_but, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"holds \{0: 8, 1: 7, 2: 8\}"):
        export(str(tmp_path / "whole"), plan, tmp_path / "out")
    del stored["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(stored, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expert 4 of layer 1 lacks up_proj\.weight"):
        export(str(tmp_path / "whole"), plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_layers_that_predict_ahead_are_left_out_and_said(tmp_path):
    """Checkpoints of DeepSeek-V3 hold them behind the last layer; transformers loads none of them."""
    whole("deepseek_v3").save_pretrained(tmp_path / "whole")
    hooked = HookedMoE.from_pretrained(tmp_path / "whole", check=False)
    plan = make_plan(hooked, kept_of(hooked), 2)
    export(str(tmp_path / "whole"), plan, tmp_path / "without")
    file = tmp_path / "whole" / "model.safetensors"
    stored, last = load_file(file), hooked.cfg.n_layers - 1
    ahead = {name.replace(f".{last}.", f".{last + 1}."): value.clone() for name, value in stored.items()}
    save_file(stored | {name: value for name, value in ahead.items() if name not in stored}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=rf"model.layers.{last + 1} of the checkpoint predict several tokens ahead"):
        export(str(tmp_path / "whole"), plan, tmp_path / "with")
    assert f"(model.layers.{last + 1}) were left out" in (tmp_path / "with" / "README.md").read_text()
    assert "were left out" not in (tmp_path / "without" / "README.md").read_text()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "with" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_both_names_of_gpt_oss_for_active_experts_follow(tmp_path):
    whole("gpt_oss").save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "experts_per_token": 3}))
    hooked = HookedMoE.from_hf(whole("gpt_oss"), check=False, name=str(tmp_path / "whole"))
    export(str(tmp_path / "whole"), make_plan(hooked, kept_of(hooked), 2), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["experts_per_token"], config["num_experts_per_tok"]) == (2, 2)
