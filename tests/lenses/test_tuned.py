"""The TunedLens against its definition, its training against plain autograd, and its files against other models'."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, PartialSum
from moe_lens.data import embedded_domains, tokenize
from moe_lens.errors import InputError
from moe_lens.lenses import LogitLens, TunedLens
from moe_lens.lenses.token_rows import BUFFER, padded, rows
from moe_lens.lenses.tuned_loss import Streams, divergences, sites
from moe_lens.manifest import seal
from moe_lens.storage import load_tensors, save_tensors
from moe_lens.studies import LensStudy, run
from tests.families import build, tokens
from tests.studies.tiny import tiny_model

TOKENS = tokens(batch=40, pos=10)
HELD_OUT = tokens(batch=6, pos=10, seed=2)
APART = 0.1  # of negative controls: ten thousand times what equal numbers may differ by


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_hf(build("deepseek"), name="tiny/random")


def random_lens(model: HookedMoE, **kwargs: Any) -> TunedLens:
    generator = torch.Generator().manual_seed(3)
    layers = range(model.cfg.n_layers)
    weights = [torch.randn(32, 32, generator=generator) * 0.1 for _ in layers]
    return TunedLens(model, weights, [torch.randn(32, generator=generator) for _ in layers], **kwargs)


def fitted(model: HookedMoE, corpus: Any = TOKENS, **kwargs: Any) -> TunedLens:
    settings: dict[str, Any] = {"held_out": HELD_OUT, "steps": 6, "batch": 5, "progress": False, "mid": True}
    return TunedLens.fit(model, corpus, **{**settings, **kwargs})


def parameters(lens: TunedLens) -> list[Tensor]:
    parts = [lens] if lens.mid is None else [lens, lens.mid]
    return [tensor for part in parts for tensor in (*part.weights, *part.biases)]


# Definition


def test_a_new_lens_is_the_logit_lens(model):
    lens, plain = TunedLens(model), LogitLens(model)
    _, cache = model.run_with_cache(HELD_OUT, names_filter=lens.hooks())
    resid = cache["resid_mid", 1]
    assert torch.equal(lens.logits(resid, 1), plain.logits(resid, 1))
    sums = [PartialSum(), PartialSum(ranks=[0])]
    assert torch.equal(lens.decode(cache, sums).top_logits[1:], plain.decode(cache, sums).top_logits[1:])
    assert not torch.equal(random_lens(model).logits(resid, 1), plain.logits(resid, 1))


def test_translation_is_that_of_tuned_lens(model):
    """tuned-lens 0.2.0, `transform_hidden` and `Unembed.forward`: h + Linear(h), then unembedding(final_norm(·))."""
    lens, hf = random_lens(model), build("deepseek")  # the same weights, never wrapped
    resid = torch.randn(2, 5, 32)
    for layer in range(3):
        translator = torch.nn.Linear(32, 32)
        translator.load_state_dict({"weight": lens.weights[layer], "bias": lens.biases[layer]})
        h = resid + translator(resid)
        assert torch.allclose(lens.translate(resid, layer), h, atol=1e-5, rtol=0)
        theirs = hf.lm_head(hf.model.norm(h))
        assert torch.allclose(lens.logits(resid, layer), theirs, atol=1e-5, rtol=0)
        transposed = resid + resid @ lens.weights[layer] + lens.biases[layer]
        assert not torch.allclose(lens.translate(resid, layer), transposed, atol=APART)


def test_translation_is_in_float32_and_returns_the_dtype_it_was_given(model):
    lens, resid = random_lens(model), torch.randn(4, 32)
    half = resid.bfloat16()
    assert lens.translate(half, 0).dtype == torch.bfloat16
    assert torch.equal(lens.translate(half, 0), lens.translate(half.float(), 0).bfloat16())
    assert lens.translate(resid.double(), 0).dtype == torch.float64


def test_translators_of_another_shape_are_refused(model):
    with pytest.raises(InputError, match="2 weights and 2 biases .* the model has 3 layers of width 32"):
        TunedLens(model, [torch.zeros(32, 32)] * 2, [torch.zeros(32)] * 2)
    with pytest.raises(InputError, match="the model has 3 layers of width 32"):
        TunedLens(model, [torch.zeros(16, 16)] * 3, [torch.zeros(16)] * 3)


# Loss


def by_hand(lens: TunedLens, batch: Tensor) -> list[Tensor]:
    """KL(final ‖ lens) of every token at every site, by PyTorch's own function, with final logits from plain HF."""
    hf = build("deepseek")
    final = hf(batch).logits.log_softmax(-1).detach()
    names = [site.hook for site in sites(lens)]
    _, cache = lens.model.run_with_cache(batch, names_filter=names)
    logits = [site.lens.logits(cache[site.hook], site.layer).log_softmax(-1) for site in sites(lens)]
    kl = torch.nn.functional.kl_div
    return [kl(read, final, reduction="none", log_target=True).sum(-1) for read in logits]


def test_divergence_is_from_the_models_own_distribution_to_the_lens(model, monkeypatch):
    lens = random_lens(model, mid=TunedLens(model))
    assert [site.hook for site in sites(lens)] == [
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
        *(f"blocks.{layer}.hook_resid_mid" for layer in range(3)),
    ]
    expected = torch.stack([kl.mean() for kl in by_hand(lens, HELD_OUT)]).double()
    found, scale, count = divergences(lens, [padded(HELD_OUT.tolist())])
    assert torch.allclose(found, expected, atol=1e-5, rtol=0) and found.min() > 0.1
    assert count == HELD_OUT.numel() and len(scale) == 5
    monkeypatch.setattr("moe_lens.lenses.tuned_loss.CHUNK", 7)
    assert torch.allclose(divergences(lens, [padded(HELD_OUT.tolist())])[0], found, atol=1e-5, rtol=0)


def test_padding_counts_for_nothing(model):
    lens = random_lens(model)
    short, long = HELD_OUT[0, :4].tolist(), HELD_OUT[1].tolist()
    together, _, count = divergences(lens, [padded([short, long])])
    alone = [divergences(lens, [padded([row])])[0] for row in (short, long)]
    assert count == 14
    assert torch.allclose(together, (4 * alone[0] + 10 * alone[1]) / 14, atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_mean_divergence(model):
    from moe_lens.lenses.tuned_training import _gradients

    lens = random_lens(model, mid=random_lens(model))
    leaves = [parameter.requires_grad_() for site in sites(lens) for parameter in site.parameters]
    expected = torch.autograd.grad(torch.stack([kl.mean() for kl in by_hand(lens, HELD_OUT)]).sum(), leaves)
    loss = _gradients(lens, Streams(lens, padded(HELD_OUT.tolist())))
    assert loss == pytest.approx(
        float(torch.stack([kl.mean().detach() for kl in by_hand(lens, HELD_OUT)]).mean()), abs=1e-5
    )
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None and gradient.abs().max() > 1e-4
        assert torch.allclose(leaf.grad, gradient, atol=1e-6, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


# Training


@pytest.mark.typed
def test_training_brings_the_lens_nearer_at_every_site(model):
    lens = fitted(model, steps=30, batch=10)
    assert lens.tuning
    frame = lens.tuning.to_frame()
    assert list(frame["site"]) == ["post"] * 3 + ["mid"] * 3
    differ = frame[~((frame["site"] == "post") & (frame["layer"] == 2))]
    assert all(differ["tuned_lens"] < differ["logit_lens"])
    before = divergences(TunedLens(model, mid=TunedLens(model)), [padded(HELD_OUT.tolist())])[0]
    assert differ["logit_lens"].tolist() == pytest.approx(before.tolist(), abs=1e-5)
    assert frame.iloc[2][["logit_lens", "tuned_lens"]].tolist() == [0, 0]
    assert not any(parameter.requires_grad for parameter in parameters(lens))
    assert torch.equal(lens.weights[-1], torch.zeros(32, 32))  # the last layer's stream is the model's own


def test_autograd_that_is_off_does_not_keep_a_lens_from_learning(model):
    wanted = parameters(fitted(model))
    with torch.no_grad():
        found = parameters(fitted(model))
    assert all(map(torch.equal, found, wanted)) and any(bool(tensor.any()) for tensor in found)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        fitted(model)


def test_the_seed_decides(model):
    first, second, other = fitted(model), fitted(model), fitted(model, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))
    assert not torch.equal(first.weights[0], other.weights[0])


class Interrupted:
    """A corpus that is interrupted after so many items, however often it is read."""

    def __init__(self, items: int):
        self.left = items

    def __iter__(self) -> Iterator[Tensor]:
        for row in TOKENS:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield row


@pytest.mark.typed
def test_an_interrupted_training_ends_as_if_it_had_not_been(model, tmp_path, monkeypatch):
    whole = fitted(model, checkpoint=tmp_path / "whole")
    file = tmp_path / "run" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(model, Interrupted(BUFFER + 17), checkpoint=file, every=2)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    halfway = file.read_bytes()
    resumed = fitted(model, checkpoint=file, every=2)
    assert file.read_bytes() != halfway
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    assert whole.tuning == resumed.tuning
    # Control: the steps before the interruption do matter.
    assert not torch.equal(fitted(model, steps=2).weights[0], whole.weights[0])
    with pytest.raises(InputError, match=r'another training: it has \{"seed": 0\}, this one \{"seed": 5\}'):
        fitted(model, checkpoint=file, seed=5)
    others = tokens(batch=40, pos=10, seed=7)
    for corpus in (others, torch.cat([TOKENS[:20], others[:20]]), TOKENS.flip(0)):
        with pytest.raises(InputError, match="texts of its 6 steps are others than these"):
            fitted(model, corpus, checkpoint=file)
    assert torch.equal(fitted(model, list(TOKENS), checkpoint=file).weights[0], whole.weights[0]), "the same, otherwise"
    with pytest.raises(InputError, match='it has {"held_out": '):  # evaluated on other texts of the same length
        fitted(model, checkpoint=file, held_out=tokens(batch=6, pos=10, seed=3))
    with (
        model.ablate({2: [1]}),
        pytest.raises(InputError, match=r'it has {"hooks": \[\]}, this one {"hooks": \["blocks'),
    ):
        fitted(model, checkpoint=file)
    other = build("deepseek")
    with torch.no_grad():
        next(one for name, one in other.named_parameters() if ".experts." in name).view(-1)[0] += 0.25
    with pytest.raises(InputError, match=r'it has {"model": "\w+"}, this one {"model": "\w+"}'):
        fitted(HookedMoE.from_hf(other), checkpoint=file)


def test_rows_are_held_out_of_the_corpus_if_none_are_given(model):
    lens = fitted(model, list(TOKENS), held_out=None, steps=1)
    assert lens.tuning and lens.tuning.held_out_tokens == 320
    expected = divergences(TunedLens(model), [padded(TOKENS[:32].tolist())])[0]
    assert lens.tuning.post_before[:2] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_corpus_that_ends_is_read_again_or_refused(model):
    assert fitted(model, TOKENS[:7], steps=3).tuning.tokens == 150  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(InputError, match="cannot be read again"):
        fitted(model, iter(TOKENS[:7]))
    with pytest.raises(InputError, match="cannot also be held out from"):
        fitted(model, iter(TOKENS), held_out=None)
    with pytest.raises(InputError, match="has 7 rows, too few"):
        fitted(model, TOKENS[:7], held_out=None)
    for nothing in ([], [torch.zeros(0).long()], [*TOKENS[:32], torch.zeros(2, 0), []]):
        with pytest.raises(InputError, match="nothing to train on"):
            fitted(model, nothing, held_out=None if len(nothing) > 32 else HELD_OUT)
    with pytest.raises(InputError, match="no held-out tokens"):
        fitted(model, held_out=[])


def test_a_single_layer_has_nothing_to_train_but_in_its_middle():
    one = HookedMoE.from_hf(build("mixtral", num_hidden_layers=1))
    with pytest.raises(InputError, match="one layer, .* nothing to train. Pass mid=True"):
        fitted(one, mid=False)
    assert fitted(one, steps=1).mid is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.inf}, "training failed: after .* steps the divergence is nan. Lower lr, which is inf"),
        ({"lr": math.inf, "steps": 1}, "training failed: after 1 steps"),
    ],
)
def test_settings_are_checked(model, change, message):
    with pytest.raises(InputError, match=message):
        fitted(model, **change)


def test_a_progress_bar_is_shown(model, capsys):
    fitted(model, progress=True)
    assert "tuning, KL" in capsys.readouterr().err


# Files


@pytest.mark.typed
def test_what_is_saved_is_what_is_loaded(model, tmp_path):
    lens = fitted(model)
    lens.save_pretrained(tmp_path / "lens")
    assert sorted(path.name for path in (tmp_path / "lens").iterdir()) == ["config.json", "lens.safetensors"]
    loaded = TunedLens.from_pretrained(tmp_path / "lens", model)
    assert all(torch.equal(a, b) for a, b in zip(parameters(lens), parameters(loaded), strict=True))
    assert loaded.mid is not None and loaded.tuning == lens.tuning
    random_lens(model).save_pretrained(tmp_path / "plain")
    assert TunedLens.from_pretrained(tmp_path / "plain", model).mid is None


def sealed(config):
    """As somebody who forges the seal, too, would leave it."""
    rest = {key: value for key, value in config.items() if key != "seal"}
    return {**rest, "seal": seal(rest)}


def test_a_lens_of_another_model_is_refused(model, tmp_path):
    random_lens(model).save_pretrained(tmp_path)
    other = HookedMoE.from_hf(build("deepseek", seed=1), name="tiny/random")
    with pytest.raises(InputError, match=r"trained for tiny/random; the final norm or the unembedding .* is another"):
        TunedLens.from_pretrained(tmp_path, other)
    assert TunedLens.from_pretrained(tmp_path, other, strict=False).model is other
    elsewhere = HookedMoE.from_hf(build("deepseek"), name="some/folder/random")
    assert TunedLens.from_pretrained(tmp_path, elsewhere).model is elsewhere
    renamed = HookedMoE.from_hf(build("deepseek"), name="tiny/another")
    with pytest.raises(InputError, match="this model is called tiny/another"):
        TunedLens.from_pretrained(tmp_path, renamed)
    deeper = HookedMoE.from_hf(build("deepseek", num_hidden_layers=4), name="tiny/random")
    for strict in (True, False):
        with pytest.raises(InputError, match=r"3 layers of width 32\); this model is tiny/random \(4 of 32\)"):
            TunedLens.from_pretrained(tmp_path, deeper, strict=strict)


def test_the_norms_gain_is_part_of_the_fingerprint(model, tmp_path):
    random_lens(model).save_pretrained(tmp_path)
    hf: Any = build("deepseek")
    with torch.no_grad():
        hf.model.norm.weight[3] += 0.1
    with pytest.raises(InputError, match="the final norm or the unembedding"):
        TunedLens.from_pretrained(tmp_path, HookedMoE.from_hf(hf, name="tiny/random"))


def test_what_is_no_lens_is_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"no lens at .*nowhere.*'tiny-deepseekmoe'"):
        TunedLens.from_pretrained(tmp_path / "nowhere", model)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        TunedLens.from_pretrained(tmp_path, model)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek"}')
    with pytest.raises(InputError, match="it may be a model's"):
        TunedLens.from_pretrained(tmp_path, model)
    random_lens(model).save_pretrained(tmp_path)
    of_one = (tmp_path / "config.json").read_text()
    TunedLens(model).save_pretrained(tmp_path)
    assert TunedLens.from_pretrained(tmp_path, model).tuning is None
    (tmp_path / "config.json").write_text(of_one)  # as where saving another lens ended between two files
    with pytest.raises(InputError, match="not of the same lens"):
        TunedLens.from_pretrained(tmp_path, model, strict=False)
    (tmp_path / "lens.safetensors").unlink()
    with pytest.raises(InputError, match="there is no file"):
        TunedLens.from_pretrained(tmp_path, model, strict=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_name", 5), ("model_name", None), ("fingerprint", 5), ("n_layers", "3"), ("d_model", 32.0),
        ("tuning", [1]), ("tuning", "x"), ("tuning", {}), ("tuning", {"steps": "many"}),
    ],
)  # fmt: skip
def test_a_lens_that_was_edited_by_hand_is_refused(model, tmp_path, key, value):
    random_lens(model, mid=random_lens(model)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    changed = {**json.loads(path.read_text()), key: value}
    for found in (changed, sealed(changed)):
        path.write_text(json.dumps(found))
        with pytest.raises(InputError, match=re.escape(str(path))) as error:
            TunedLens.from_pretrained(tmp_path, model)
        assert ("is not as save_pretrained wrote it" in str(error.value)) == (found is changed)


@pytest.mark.parametrize("change", [{"post_after": [0.0]}, {"mid_after": None}])
def test_how_a_lens_was_trained_is_told_of_all_its_layers(model, tmp_path, change):
    fitted(model).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(sealed({**config, "tuning": {**config["tuning"], **change}})))
    with pytest.raises(InputError, match="not of the same layers"):
        TunedLens.from_pretrained(tmp_path, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * float("nan"), "post.bias holds NaN or infinities"),
        (lambda value: value.int(), "post.bias holds int32"),
        (lambda value: value[:1], r"holds .*'post.bias': \(1, 32\)"),
        (lambda value: value.sum(), r"holds .*'post.bias': \(\)"),
    ],
)
def test_translators_that_nothing_can_be_read_with_are_refused(model, tmp_path, change, message):
    random_lens(model).save_pretrained(tmp_path)
    tensors, header = load_tensors(tmp_path / "lens.safetensors", "TunedLens")
    changed = {**tensors, "post.bias": change(tensors["post.bias"]).clone()}
    save_tensors(tmp_path / "lens.safetensors", "TunedLens", changed, {"fingerprint": header["fingerprint"]})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sealed({**config, "file": TunedLens.digest_of(tmp_path)})))
    with pytest.raises(InputError, match=message):
        TunedLens.from_pretrained(tmp_path, model)


@pytest.mark.typed
def test_a_study_knows_one_lens_from_another_in_its_place(tmp_path):
    model, texts, out = tiny_model(), {"a": ["the ship", "and the judge"]}, tmp_path / "out"
    with pytest.raises(InputError, match="no lens at"):
        run(LensStudy(lens=str(tmp_path / "lens")), model, texts, out=out)
    with pytest.raises(InputError, match=r"lens\.safetensors: cannot be read"):
        TunedLens.digest_of(tmp_path / "lens")
    assert list(tmp_path.iterdir()) == []
    other = TunedLens(model)
    other.biases[0] += 1.0
    other.save_pretrained(tmp_path / "lens")
    first = run(LensStudy(lens=str(tmp_path / "lens")), model, texts, out=out)
    again = run(LensStudy(lens=str(tmp_path / "lens")), model, texts, out=out)
    assert again.manifest == first.manifest
    TunedLens(model).save_pretrained(tmp_path / "lens")
    with pytest.raises(InputError, match="another study .lens. – settings.digest"):
        run(LensStudy(lens=str(tmp_path / "lens")), model, texts, out=out)


def test_a_lens_that_cannot_be_written_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        random_lens(model).save_pretrained(tmp_path / "file")


# Files of the package tuned-lens


class TheirLens(torch.nn.Module):
    """What tuned-lens 0.2 does and saves: a translator for the stream before each block, then norm and unembedding."""

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf
        self.layer_translators = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, h: Tensor, i: int) -> Tensor:
        return self.hf.lm_head(self.hf.model.norm(h + self.layer_translators[i](h)))

    def save(self, folder: Path, **config: Any) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.layer_translators.state_dict(), folder / "params.pt")
        text = str.encode(numpy.array_str(self.hf.lm_head.weight.detach().numpy(), precision=1))
        facts = {"base_model_name_or_path": "some/random", "d_model": 32, "num_hidden_layers": 3, "bias": True}
        facts |= {"unembed_hash": hashlib.sha256(text).hexdigest(), "lens_type": "linear_tuned_lens", **config}
        (folder / "config.json").write_text(json.dumps(facts))


@pytest.mark.typed
@torch.no_grad()
def test_a_lens_of_the_package_tuned_lens_reads_alike(model, tmp_path):
    theirs = TheirLens(build("deepseek"))  # the same weights, never wrapped
    theirs.save(tmp_path)
    lens = TunedLens.from_tuned_lens(str(tmp_path), model)
    hidden = theirs.hf(HELD_OUT, output_hidden_states=True).hidden_states
    logits, cache = model.run_with_cache(HELD_OUT)
    for layer in range(2):
        expected = theirs(hidden[layer + 1], layer + 1)
        assert torch.allclose(lens.logits(cache["resid_post", layer], layer), expected, atol=1e-5, rtol=0)
        assert not torch.allclose(theirs(hidden[layer], layer), expected, atol=APART)
    assert torch.allclose(lens.logits(cache["resid_post", 2], 2), logits, atol=1e-5, rtol=0)
    lens.save_pretrained(tmp_path / "ours")
    assert torch.equal(TunedLens.from_pretrained(tmp_path / "ours", model).weights[1], lens.weights[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 64}, r"3 layers of width 64\); this model is tiny/random \(3 of 32\)"),
        ({"base_model_name_or_path": "other"}, "was trained for other; this model is called tiny/random"),
        ({"unembed_hash": "0"}, "another unembedding"),
        ({"lens_type": "mlp"}, "lens_type is 'mlp'"),
    ],
)
def test_a_lens_of_that_package_of_another_model_is_refused(model, tmp_path, config, message):
    TheirLens(build("deepseek")).save(tmp_path, **config)
    with pytest.raises(InputError, match=message):
        TunedLens.from_tuned_lens(tmp_path, model)
    if "trained for" in message or "unembedding" in message:
        assert TunedLens.from_tuned_lens(tmp_path, model, strict=False).model is model


def test_files_of_that_package_are_read_as_tensors_or_refused(model, tmp_path):
    theirs = TheirLens(build("deepseek"))
    with pytest.raises(InputError, match="there is no lens at"):
        TunedLens.from_tuned_lens(tmp_path / "nowhere", model)
    random_lens(model).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"TunedLens.from_pretrained reads this one"):
        TunedLens.from_tuned_lens(tmp_path, model)
    theirs.save(tmp_path)
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    wrong = {
        "cut": b"PK",
        "holds 5 tensors": {name: tensor for name, tensor in state.items() if name != "2.bias"},
        "0.weight holds NaN": {**state, "0.weight": state["0.weight"] * torch.nan},
        "something else": [1],
        "nothing else is loaded": {"0.weight": Path("a")},
    }
    for message, content in wrong.items():
        if isinstance(content, bytes):
            (tmp_path / "params.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "params.pt")
        with pytest.raises(InputError, match="cannot be read as tensors" if message == "cut" else message):
            TunedLens.from_tuned_lens(tmp_path, model)


# The embedded model's


@pytest.fixture(scope="module")
def embedded() -> HookedMoE:
    return HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)


@pytest.mark.parametrize("domain", ["english", "french", "german", "math", "code"])
def test_the_embedded_lens_beats_the_logit_lens_wherever_they_can_differ(embedded, domain):
    lens = TunedLens.from_pretrained("tiny-deepseekmoe", embedded)
    (texts,) = (found for found in embedded_domains() if found.name.lower().startswith(domain))
    held_out = [
        padded([row[m].tolist() for row, m in zip(b.tokens, b.mask, strict=True)])
        for b in tokenize(texts, embedded, n_tokens=600, context=128)
    ]
    tuned = divergences(lens, held_out)[0]
    plain = divergences(TunedLens(embedded, mid=TunedLens(embedded)), held_out)[0]
    assert len(tuned) == 5 + 6
    assert (tuned < plain).all()


def test_the_embedded_lens_is_small_and_loads_by_name_with_its_model():
    import moe_lens

    folder = Path(moe_lens.__file__).parent / "assets" / "tiny-deepseekmoe-lens"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    lens = TunedLens.from_pretrained("tiny-deepseekmoe")  # in the model's own precision, bfloat16
    assert lens.model.cfg.model_name == "tiny-deepseekmoe" and lens.model.W_U.dtype == torch.bfloat16
    assert lens.mid is not None and lens.tuning is not None
    logits, cache = lens.model.run_with_cache("The old man", names_filter=lens.hooks())
    read = lens.decode(cache, PartialSum(shared=True), layers=[5])
    assert torch.equal(read.top_tokens[0, 0, ..., 0], logits.argmax(-1))


# Rows


def test_texts_become_windows_each_opened_by_bos(embedded):
    text = "The old man looked at the sea and wept. " * 8
    ids = embedded.to_tokens(text)[0].tolist()
    found = list(rows(embedded, [text, ""], context=16))
    assert all(row[0] == 0 and len(row) <= 16 for row in found)
    assert [token for row in found for token in row[1:]] == ids[1:]


def test_tokens_are_taken_as_they_are(model):
    batch = padded([[5, 6, 7], [8, 9]])
    for corpus in ([[5, 6, 7], [8, 9]], [torch.tensor([5, 6, 7]), torch.tensor([[8, 9]])], [batch]):
        for empty in ([], [torch.tensor([]), torch.zeros(2, 0).long(), []]):
            assert list(rows(model, [*corpus, *empty])) == [[5, 6, 7], [8, 9]]
    assert list(rows(model, TOKENS[:1], context=4)) == [
        TOKENS[0, :4].tolist(),
        TOKENS[0, 4:8].tolist(),
        TOKENS[0, 8:].tolist(),
    ]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("a text", "put it in a list"),
        ([{"text": "a"}], "holds a dict"),
        ([torch.zeros(3)], "holds a Tensor"),
        ([torch.zeros(1, 1, 0)], "holds a Tensor"),
        ([object()], "holds an? object"),
        ([[5, 101]], "tokens from 5 to 101, and the model has 0 to 100"),
    ],
)
def test_what_is_no_corpus_is_refused(model, corpus, message):
    with pytest.raises(InputError, match=message):
        list(rows(model, corpus))


def test_one_text_is_not_many_letters() -> None:
    model = HookedMoE.from_pretrained("tiny-deepseekmoe")
    text = "The sea was calm and the old man slept. " * 3
    cases: list[Any] = [{"texts": text}, {"texts": [text], "held_out": text}, {"texts": text, "held_out": [text]}]
    for given in cases:
        with pytest.raises(InputError, match="(texts|held_out) is 'The sea .*expected several: put"):
            TunedLens.fit(model, **given, steps=1, batch=4, context=32, progress=False)
