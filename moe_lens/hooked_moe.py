"""HookedMoE: a TransformerBridge with hook points inside every Mixture-of-Experts layer."""

import importlib
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lens import names
from moe_lens.checked import Natural, checked
from moe_lens.errors import HookError, InputError
from moe_lens.ids import ids
from moe_lens.interventions import ablation, any_k, rerouting
from moe_lens.interventions.intervention import Intervention, check_interventions
from moe_lens.model.experts.expert_weights_view import grouped_product
from moe_lens.model.experts.offloaded_experts import check_unwritten, renew_placeholders
from moe_lens.model.experts.quantised import Wish
from moe_lens.model.hooks.adapter import build_adapter
from moe_lens.model.hooks.expert_kernel import experts_forward
from moe_lens.model.hooks.generation import GeneratingBridge
from moe_lens.model.hooks.layer_hooks import LayerHooks
from moe_lens.model.hooks.output_capture import capture_once
from moe_lens.model.hooks.self_check import self_check
from moe_lens.model.hooks.transaction import modes_kept, undone_on_error
from moe_lens.model.loading.left_on_disk import watch_files
from moe_lens.model.loading.pretrained import Trust, load_pretrained, warn_if_slow
from moe_lens.model.loading.quantising import packed_in, read_quantize
from moe_lens.model.loading.saving import save_pretrained
from moe_lens.model.loading.transformer_lens_words import read_words
from moe_lens.model.loading.validate import (
    check_tokenizer,
    check_wrappable,
    refuse_adapters,
    refuse_plan,
    refuse_shards,
)
from moe_lens.model.torch_transforms import uncompiled
from moe_lens.reprs import Summary
from moe_lens.routing import Routing

if TYPE_CHECKING:
    from moe_lens.atlas import AtlasFolder

_NOT_OF_ROUTING = frozenset(
    ("incl_bwd", "keep_graph", "labels", "loss_per_token", "logits_to_keep", "names_filter", "remove_batch_dim")
    + ("return_cache_object", "return_type", "stop_at_layer")
)
"""Arguments of `run_with_cache` that say what is kept and what comes back, which `routing` knows itself."""


@checked
class HookedMoE(Summary, GeneratingBridge):
    """A transformers MoE language model whose routers and experts are hook points.

    Use it as a TransformerBridge: `run_with_cache`, `run_with_hooks`, `hooks`, `generate`, `to_tokens`. The hook table
    is in `moe_lens.names`. Wrapping changes the transformers model in place: afterwards, use only the wrapper.
    """

    # --- loading and saving ---

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        check: bool = True,
        trust_remote_code: Trust = False,
        quantize: Wish | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model by hub name, local folder, or `"tiny-deepseekmoe"`, the embedded one.

        Args:
            name_or_path: what transformers' `from_pretrained` takes.
            check: run the self-check on a few tokens.
            trust_remote_code: run code that comes with the checkpoint; `"tokenizer"` runs only its tokenizer's code.
                DeepSeekMoE does not need it.
            quantize: pack experts and the blocks' linear layers while loading, in 4 bits (`"nf4"`, `"fp4"`) or 8
                (`"int8"`), by bitsandbytes. Routers, norms and embeddings stay in their dtype. A `BitsAndBytesConfig`
                does the same. `"stored"` keeps the bits of a checkpoint that is already packed (FP8, MXFP4, …);
                results are those of the unpacked checkpoint.
            kwargs: `dtype`, `device_map`, `revision`, `cache_dir`, … as in transformers; `device`, `tokenizer`,
                `first_n_layers`, `default_prepend_bos` and `default_padding_side` as in TransformerLens, and its flags
                for processing weights if they are off (`fold_ln=False`). Without `dtype`, the checkpoint's own.
                Without `device` and `device_map`, weights go to the first place that has room: one GPU, several GPUs,
                GPUs and main memory, these and the disk; `max_memory` limits the memory used, as in transformers.

        Raises:
            CheckpointError: the checkpoint is incomplete or wrong; names file and tensor.
            UnsupportedModelError: the family is not supported, or a flag asks for weights to be processed.
            SelfCheckError: the hooked parts do not sum to a layer's output.
            InputError: an unknown argument, or one of TransformerLens's that has another name here.
        """
        refuse_plan(kwargs)
        asked = read_words(kwargs)
        read_quantize(quantize, kwargs)
        model, tokenizer = load_pretrained(str(name_or_path), trust_remote_code=trust_remote_code, **kwargs)
        warn_if_slow(model)
        tokenizer = tokenizer if asked.tokenizer is None else asked.tokenizer
        if asked.prepend_bos and getattr(tokenizer, "bos_token_id", None) is None:
            raise InputError("from_pretrained: default_prepend_bos=True, and there is no tokenizer with a BOS token")
        hooked = cls.from_hf(model, tokenizer, name=str(name_or_path), check=check)
        if asked.prepend_bos is not None:
            hooked.cfg.default_prepend_bos = asked.prepend_bos
        hooked.__dict__["default_padding_side"] = asked.padding_side
        return hooked

    @classmethod
    def from_pretrained_no_processing(cls, name_or_path: str | Path, **kwargs: Any) -> Self:
        """TransformerLens's name for `from_pretrained`, which never processes weights.

        Args:
            name_or_path: see `from_pretrained`.
            kwargs: see `from_pretrained`.

        Raises:
            MoELensError: see `from_pretrained`.
        """
        return cls.from_pretrained(name_or_path, **kwargs)

    @staticmethod
    def boot_transformers(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG004
        """Not supported: TransformerLens's function of this name does not make a `HookedMoE`.

        Raises:
            InputError: always; says what to write instead.
        """
        raise InputError("boot_transformers makes a plain TransformerBridge: write HookedMoE.from_pretrained(name, …)")

    @classmethod
    def from_hf(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        check: bool = True,
    ) -> Self:
        """Wrap a loaded transformers model, in place and permanently; if that fails, the model stays as it was.

        The tokenizer is used as it is and never changed, including its added tokens, pad, BOS and EOS tokens, and chat
        template.

        Args:
            model: a causal language model of transformers; use it only through the wrapper afterwards.
            tokenizer: its tokenizer; without one, inputs must be token ids.
            name: the name that results and error messages use; that of the checkpoint if not given.
            check: run the self-check on a few tokens.

        Raises:
            UnsupportedModelError: the family is not supported, the model predicts no tokens, it is already wrapped, or
                adapters of PEFT on it are not merged.
            InputError: not a model, or not a tokenizer, of transformers.
            SelfCheckError: the hooked parts do not sum to a layer's output.
        """
        check_wrappable(model)
        refuse_adapters(model)
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        refuse_shards(model)
        known_as = name or getattr(model.config, "name_or_path", "") or family_name(model)
        with undone_on_error(model), modes_kept(model):
            capture_once(model)
            renew_placeholders(model)
            adapter, family = build_adapter(model, known_as)
            hooked = cls(model, adapter, tokenizer, family)
            hooked._check_model()
            if check and not any(p.is_meta for p in model.parameters()):
                self_check(hooked)
            watch_files(model)
            return hooked

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the model (and tokenizer) as transformers does, in the family's original format.

        Args:
            folder: where to write it.
            kwargs: of transformers' `save_pretrained`.
        """
        self._check_places()
        model: Any = self.original_model
        check_unwritten(model)
        save_pretrained(model, self._original_names, self.tokenizer, Path(folder), **kwargs)

    # --- what the model is ---

    def _facts(self) -> dict[str, Any]:
        first = next(self.original_model.parameters())
        layers = f"{self.cfg.n_layers}, of them {len(self.moe_layers)} with experts"
        shared = any(self.has_shared(layer) for layer in self.moe_layers)
        experts = f"{self.n_experts}, {self.top_k} active a token{', and shared ones' if shared else ''}"
        packed = [part for _, part in packed_in(self.original_model)]
        parameters = sum(part.numel() for part in (*self.original_model.parameters(), *packed))
        return {
            "name": self.cfg.model_name,
            "model_type": self.family.model_type,
            "layers": layers,
            "experts": experts,
            "d_model": self.cfg.d_model,
            "parameters": f"{parameters:,}",
            "dtype": str(first.dtype).removeprefix("torch.") + (f", experts in {packed[0].scheme}" if packed else ""),
            "device": str(first.device),
        }

    # --- routing ---

    @uncompiled
    def routing(self, input: Any, **kwargs: Any) -> Routing:
        """Routing of every MoE layer on a text or on tokens; no other activation is kept.

        Args:
            input: what `forward` takes: text, texts, tokens, what a tokenizer returns, …
            kwargs: arguments of `forward` (`attention_mask`, `prepend_bos`, …), and `pos_slice`, `device` and `dtype`
                of what is kept.

        Raises:
            InputError: an argument that would keep or return something else.
        """
        if wrong := sorted(_NOT_OF_ROUTING & kwargs.keys()):
            raise InputError(
                f"routing has no argument {', '.join(wrong)}: it keeps and returns what routers say of every layer; "
                "run_with_cache keeps anything"
            )
        kept = {names.ROUTER_LOGITS, names.EXPERT_INDICES, names.ROUTING_WEIGHTS}
        wanted = [names.mlp(name, layer) for layer in self.moe_layers for name in kept]
        with torch.no_grad():
            _, cache = self.run_with_cache(input, names_filter=wanted, return_type=None, **kwargs)
        return Routing.stack([cache.routing(layer) for layer in self.moe_layers])

    # --- interventions ---

    ablate = ablation.ablate
    keep_top = ablation.keep_top
    use_experts = any_k.use_experts
    force_routing = rerouting.force_routing
    steer_experts = rerouting.steer_experts

    @uncompiled
    def generate(self, input: Any = "", *args: Any, interventions: Iterable[Intervention] = (), **kwargs: Any) -> Any:
        """Generate as in TransformerLens, with interventions active; the first one is outermost.

        Every new token has its own forward pass, which hooks see. For transformers' other ways of generating (beams,
        constraints, …) use `hf_generate` inside `with intervention:`.

        Args:
            input: what `forward` takes. Padding is moved to the left, so that generation continues the text.
            args: `max_new_tokens` and so on, in TransformerLens's order.
            interventions: what `ablate`, `keep_top`, `use_experts`, `force_routing` and `steer_experts` return.
            kwargs: `max_new_tokens`, `do_sample`, `temperature`, `return_type`, …; and inputs of
                some transformers models, such as `pixel_values`.

        Raises:
            InputError: an object that is not an intervention on this model, an invalid prompt, or an argument that
                TransformerLens's `generate` does not have.
        """
        with self.hooks([hook for one in check_interventions(self, interventions) for hook in one.hooks]):
            return super().generate(input, *args, **kwargs)

    def generate_stream(
        self, input: Any = "", *args: Any, interventions: Iterable[Intervention] = (), **kwargs: Any
    ) -> Generator[Any]:
        """Generate as `generate` does, and yield pieces as they are made; the first piece includes the prompt.

        Interventions are active while a piece is computed, not between pieces, so that other runs are not affected.

        Args:
            input: see `generate`.
            args: see `generate`.
            interventions: see `generate`.
            kwargs: see `generate`; `max_tokens_per_yield` is the number of tokens of a piece.

        Raises:
            InputError: see `generate`; raised at the call, not at the first piece.
        """
        hooks = [hook for one in check_interventions(self, interventions) for hook in one.hooks]
        pieces = super().generate_stream(input, *args, **kwargs)

        def stream() -> Generator[Any]:
            with closing(pieces):
                while True:
                    with self.hooks(hooks):
                        try:
                            piece = next(pieces)
                        except StopIteration:
                            return
                    yield piece

        return stream()

    # --- experts ---

    @torch.no_grad()
    def expert_outputs(
        self,
        layer: Natural,
        x: Float[Tensor, "*tokens d_model"],
        experts: Int[Tensor, "*tokens n"] | Bool[Tensor, " n_experts"],
    ) -> Float[Tensor, "*tokens n d_out"]:
        """E_i(x), before its weight, of any experts at any tokens, selected or not; no hook fires and no router runs.

        Args:
            layer: a layer with experts.
            x: the experts' input, as in `mlp.hook_in`.
            experts: ids, n for each token; or a mask of all experts [n_experts], for the same n at every token.

        Returns:
            Of each token and expert; of no tokens, as a sample of a batch may hold, nothing.

        Raises:
            HookError: the layer is dense.
            InputError: an id out of range, something that is neither ids nor a mask, or no expert.
        """
        if layer not in self.moe_layers:
            raise HookError(f"layer {layer} has no experts; MoE layers are {list(self.moe_layers)}")
        if experts.dtype == torch.bool:
            chosen = ids("experts", experts)
            chosen.check("experts", self.n_experts)
            experts = torch.tensor(chosen, device=x.device).expand(*x.shape[:-1], -1)
        elif experts.is_floating_point() or experts.is_complex():
            raise InputError(f"experts are {experts.dtype}; expected whole numbers, or a mask of {self.n_experts}")
        experts = experts.long()  # torch reads bytes as a mask
        wrong = (experts < 0) | (experts >= self.n_experts)
        if wrong.any():
            raise InputError(
                f"there is no expert {int(experts[wrong][0])}; expected ids from 0 to {self.n_experts - 1}"
            )
        if x.shape[-1] != self.cfg.d_model:
            raise InputError(f"x is {x.shape[-1]} wide; expected {self.cfg.d_model}, what mlp.hook_in holds")
        if not experts.shape[-1]:
            raise InputError(f"no expert is asked for at {tuple(x.shape[:-1])} tokens; expected one at least")
        self._check_places()
        moe, module = self._moe(layer), self._experts(layer)
        for narrower in self.family.narrows:
            x = moe.get_submodule(narrower)(x)
        rows = x[..., None, :].expand(*experts.shape, x.shape[-1]).reshape(-1, x.shape[-1])
        with module.on_device():
            matrix, _ = module.second()
            if not len(rows):
                return x.new_zeros(*experts.shape, matrix.shape[-1], dtype=matrix.dtype)
            rows = rows.to(matrix.device, matrix.dtype)
            silent = LayerHooks(layer, linear_branch=module.has_gate, shared=False)
            flat = experts.reshape(-1, 1).to(rows.device)
            out = experts_forward(module, silent, rows, flat, rows.new_ones(flat.shape), grouped_product)
        return out.view(*experts.shape, -1).to(x.device)

    # --- what people look at ---

    def atlas(self, domains: Any, out: str | Path = "moe-lens-atlas", **kwargs: Any) -> "AtlasFolder":
        """Write a page for every expert, or continue where this was interrupted; a notebook can then show each.

        `model.atlas(domains).expert(4, 17)` is the card of expert 17 of layer 4.

        Args:
            domains: Texts by domain: `{name: texts}`, or what `moe_lens.data` offers.
            out: The folder; `index.html` in it is the page to open.
            kwargs: Arguments of `moe_lens.atlas.run`: `reading`, `study`, `knock_out`, …

        Raises:
            InputError: The texts cannot be used, or the folder holds the atlas of another model or other texts.
        """
        # Pages stand above models in the layers, as figures stand above results.
        atlas = importlib.import_module("moe_lens.atlas")
        return atlas.AtlasFolder(atlas.run(self, domains, out, **kwargs).parent)


def family_name(model: PreTrainedModel) -> str:
    """A name for a model that was not loaded from anywhere."""
    return f"{model.config.model_type} (not loaded from a checkpoint)"
