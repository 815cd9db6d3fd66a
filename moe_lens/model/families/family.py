"""What the wrapper has to know of one model type."""

from dataclasses import dataclass
from typing import Literal

from moe_lens.model.hf_compat import OLDEST

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True)
class Layout:
    """Where transformers keeps the parts of a decoder, and how a layer of it adds up what its parts compute.

    Names of modules; those of a layer are looked up in each layer, and one that a layer lacks has no hooks there.
    """

    decoder: str = "model"
    """Path of the module that holds the embedding, the layers and the final norm."""
    layers: str = "layers"
    embed: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    ln1: str | None = "input_layernorm"
    ln1_post: str | None = None
    """Norm of what attention adds."""
    ln2: str | None = "post_attention_layernorm"
    """Norm of what the MLP reads; None where it reads the residual stream itself."""
    ln2_post: str | None = None
    """Norm of what the MLP adds."""
    mlp: str = "mlp"
    inner: str | None = None
    """Module of the MLP that holds router and experts, where it is not the MLP itself."""
    bare: bool = False
    """Whether `mlp` names the experts themselves, with the router beside them in the layer: then hook_in is what the
    experts read, and hook_out their sum."""
    attn: str | None = None
    """What mixes positions, where it has none of the usual names."""
    others: tuple[tuple[str, str], ...] = ()
    """Further parts of a layer: name of the component, and of the module."""
    offset: bool = False
    """Whether the norms multiply by 1 + weight."""
    stream: Literal["sequential", "parallel", "shortcut", "rescaled", "other"] = "sequential"
    """`sequential`: resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post. `parallel`: attention and MLP
    read the same norm, and there is no resid_mid. `shortcut`: what the experts give is added behind `others`, so that
    no point of the stream lies before them alone: no hook_resid_mid, hook_attn_out or hook_mlp_out; resid_pre + what
    attention, `added` and experts give = resid_post. `rescaled`: resid_pre + attn_out = resid_mid, but what the MLP
    adds is rescaled together with the stream: no hook_mlp_out. `other`: the stream is rescaled, gated, or many streams,
    so what a part adds is no term of a sum: no hook_resid_mid, hook_attn_out or hook_mlp_out."""
    added: tuple[str, ...] = ()
    """Those of `others` whose outputs are added to the stream."""
    streams: bool = False
    """Whether what passes between layers is no one stream: then there is no hook_resid_pre or hook_resid_post."""
    multiplier: str | None = None
    """Attribute of a layer: what attention and MLP compute is multiplied by it before it is added."""
    embed_multiplier: str | None = None
    """Field of the config that embeddings are multiplied by."""
    logits_multiplier: str | None = None
    """Field of the config that logits are multiplied by."""
    logits_divisor: str | None = None
    """Field of the config that logits are divided by."""


@dataclass(frozen=True)
class Family:
    """What is particular to one model type; everything else is read off the modules."""

    model_type: str
    """`config.model_type` of transformers."""
    router: str = "gate"
    """Name of the router module in the MoE block."""
    router_weight: str = "weight"
    """Path of the matrix in the router that makes the logits."""
    shared: str | None = None
    """Name of the shared experts' MLP in the MoE block, or beside it in the layer."""
    shared_gate: str | None = None
    """Name of the linear layer whose sigmoid scales the shared experts' output."""
    score: Score = "softmax"
    """Affinity of all experts as a function of the router logits."""
    score_field: str | None = None
    """Field of the config that says which score function a checkpoint uses."""
    top_k: str = "num_experts_per_tok"
    """Field of the config that says how many experts a token has, where the router has no attribute `top_k`."""
    interleaved: bool = False
    """Whether `gate_up_proj` alternates the two branches instead of concatenating them."""
    dead: tuple[str, ...] = ()
    """Endings of TransformerLens's hook names that never fire in this family."""
    experts: Literal["packed", "looped", "longcat", "dbrx", "jetmoe", "llama4"] = "packed"
    """How transformers holds and computes the experts: under its experts contract, or as `bypass.py` knows."""
    weighs_input: bool = False
    """Whether weights multiply what an expert reads, not what it gives: expert_out is then what is added."""
    constant: str | None = None
    """Parameter of the MoE block that it adds to every token's output; hook_shared_out shows it."""
    layout: Layout | None = None
    """Where the parts are, for the generic adapter; None uses TransformerLens's."""
    normalised: Literal["always", "config", "never"] = "never"
    """Whether weights are divided by their sum over the chosen experts; `config`: as `norm_topk_prob` says."""
    bias: bool = False
    """Whether a bias is added to the affinities for the choice alone."""
    groups: int = 0
    """Where experts are chosen within the best groups of experts (`n_group`, consecutive ones in each), of how many of
    its experts the rank of a group is made; 0 where there are no groups."""
    scaled: str | None = None
    """Attribute of the router or the MoE block that weights are multiplied by: a number, or one for each expert."""
    scaled_after: bool = False
    """Whether that is done by the block, after the experts."""
    averaged: str | None = None
    """Attribute of the MoE block that says `average` where routed and shared experts are averaged, not added."""
    shared_logits: bool = False
    """Whether the router's product has columns for the shared experts behind those of the routed ones."""
    logits_factor: str | None = None
    """Attribute of the router: its product is multiplied by it, or bounded with it, before anything else; 0 is off."""
    narrows: tuple[str, ...] = ()
    """Modules of the MoE block that take what experts read into a narrower space."""
    widens: str | None = None
    """Module of the MoE block that brings the experts' sum back: hook_expert_out, hook_expert_weighted and
    hook_routed_out are as wide as the space."""
    narrow_field: str | None = None
    """Field of the config that is None where a checkpoint's experts have no such space."""
    reads_own: bool = False
    """Whether the router reads another input than the experts: logits are not those of `mlp.hook_in`."""
    select: Literal["topk", "sparsemixer", "token"] = "topk"
    """How experts are chosen: the largest scores, one after the other (PhiMoE), or by the token's id in some layers."""
    one_by_one: bool = False
    """Whether transformers goes on with a key-value cache by one token alone: several it reads as if it were empty."""
    reads_front: bool = False
    """Whether transformers' attention reads padding in front of a text, whatever the mask."""
    mixes_packed: bool = False
    """Whether texts that are packed into one row reach one another in transformers, although positions start again:
    the mask is made without positions, or a state runs on through the row."""
    resident: tuple[str, ...] = ()
    """Modules, by the ends of their names, whose parameters are read without a call of the module: they are not brought
    from elsewhere, and have to be in memory."""
    note: str = ""
    """What a user should know beyond the fields: which hooks are lacking, and why."""
    since: tuple[int, ...] = OLDEST
    """The first release of transformers on which every check passes."""
    until: tuple[int, ...] | None = None
    """The first release of transformers, if there is one, on which they no longer pass."""

    @property
    def adds_as_computed(self) -> bool:
        """Whether routed and shared outputs are added to the residual stream as they are, not through a norm."""
        layout = self.layout
        return self.widens is None and (
            layout is None or (layout.stream in ("sequential", "parallel", "shortcut") and layout.ln2_post is None)
        )

    @property
    def adds_last(self) -> bool:
        """Whether what experts give is the last that a layer adds, to a stream that no hook shows."""
        return self.layout is not None and self.layout.stream == "shortcut"

    def holds_on(self, release: tuple[int, ...]) -> bool:
        """Whether the checks pass on a release of transformers."""
        return self.since <= release and (self.until is None or release < self.until)

    def releases(self) -> str:
        """The releases of transformers that it needs, in words; empty if any that moe_lens allows will do."""
        parts = [f"{dotted(self.since)} or newer"] if self.since > OLDEST else []
        parts += [f"older than {dotted(self.until)}"] if self.until else []
        return f"transformers {', '.join(parts)}" if parts else ""

    def specifier(self) -> str:
        """The same, as pip reads it."""
        return f">={dotted(self.since)}" + (f",<{dotted(self.until)}" if self.until else "")

    def rule(self, top_k: int | None = None, normalises: bool | None = None) -> str:
        """How experts are chosen and weighted, in words.

        Args:
            top_k: experts of a token.
            normalises: what the config says about normalisation, where it is the config that says.
        """
        many = "k" if top_k is None else str(top_k)
        score = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "√softplus"}[self.score]
        if self.select == "sparsemixer":
            return f"sparse mixer: the largest logit, {many} times; each weight a softmax over the logits close to it"
        chosen = f"{many} largest" + (" of the best groups" if self.groups else "") + (" + bias" if self.bias else "")
        if self.select == "token":
            chosen += ", or by token id"
        says = {None: "normalised if norm_topk_prob", True: "normalised", False: ""}[normalises]
        divided = {"always": "normalised", "config": says, "never": ""}[self.normalised]
        parts = [score, chosen, divided, f"× {self.scaled}" if self.scaled else ""]
        return ", ".join(part for part in parts if part)


def dotted(release: tuple[int, ...]) -> str:
    """A release as it is written."""
    return ".".join(map(str, release))
