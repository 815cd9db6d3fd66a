"""The contract of transformers' experts, and what the kernel, `model.W_*` and counts of parameters read of it.

Under it a router returns `(logits, weights, indices)`, and an experts module holds packed parameters, is called as
`experts(hidden, indices, weights)`, and says with flags what is particular. `Experts` reads such a module; the blocks
that bypass the contract are presented under it in `bypass.py`.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.experts.offloaded_experts import StoredMatrices, is_elsewhere
from moe_lens.model.experts.packed import Matrices, Packed, ReadableMatrices, packed_product


class Rows(NamedTuple):
    """The rows that a pass computes: one for each slot that is not left out, sorted by expert."""

    ids: Int[Tensor, " rows"]
    """The expert of each."""
    tokens: Int[Tensor, " rows"]
    """The token of each."""
    ends: Int[Tensor, " n_experts"]
    """Where each expert's rows end."""
    n_tokens: int

    def counts(self) -> list[int]:
        """How many rows each expert has."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()

    def first(self, n_experts: int, n_rows: int) -> "Rows":
        """Those of the first experts alone."""
        return Rows(self.ids[:n_rows], self.tokens[:n_rows], self.ends[:n_experts], self.n_tokens)

    def of_used(self) -> tuple[Int[Tensor, " used"], "Rows"]:
        """The experts that have rows, and the same rows counted among those alone."""
        used, ids = self.ids.unique_consecutive(return_inverse=True)
        return used, Rows(ids, self.tokens, self.ends[used], self.n_tokens)

    def apart(self) -> Iterator["Rows"]:
        """Those of each expert by themselves."""
        for tokens in self.tokens.split(self.counts()):
            yield Rows(torch.zeros_like(tokens), tokens, self.ends.new_tensor([len(tokens)]), self.n_tokens)


Product = Callable[[Tensor, Tensor, Rows], Tensor]
"""Of values [rows, in] and matrices [expert, in, out]: each row times the matrix of its expert."""


class Experts:
    """The experts of one layer. Matrices are views of the module's own parameters, [expert, in, out].

    Raises:
        UnsupportedModelError: the module is not what its family has, or its parameters are quantised.
    """

    alone = True
    """Whether the product of one expert's rows is, to the bit, what it is among those of others."""

    def __init__(self, module: Any, interleaved: bool = False, weighs_input: bool = False):
        self.module, self.interleaved, self.weighs_input = module, interleaved, weighs_input
        known = self._read_flags()
        parameters = self._parameters() if known else [None]
        full = all(
            isinstance(p, Packed)
            or (isinstance(p, Tensor | StoredMatrices) and p.is_floating_point() and p.element_size() >= 2)
            for p in parameters
        )
        if not full or "FP8" in type(module).__name__:
            raise UnsupportedModelError(
                f"{type(module).__name__} is not under transformers' experts contract (packed gate_up_proj and "
                "down_proj, of 16 bits at least); quantised experts replace it. Dequantise while loading, with "
                "quantization_config=Mxfp4Config(dequantize=True) or FineGrainedFP8Config(dequantize=True) of "
                "transformers; other formats have no way back"
            )

    def _read_flags(self) -> bool:
        """Read what the module says of itself; whether it says anything."""
        flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
        self.has_gate, self.has_bias, self.transposed, self.post_norm = (
            bool(getattr(self.module, flag, False)) for flag in flags
        )
        return hasattr(self.module, "has_gate")

    # --- what they are ---

    @property
    def n_experts(self) -> int:
        """How many there are, identities included."""
        return int(self.module.num_experts)

    @property
    def n_identities(self) -> int:
        """Experts, the last ids, that give back what they read; they have no matrices."""
        return 0

    @property
    def n_matrices(self) -> int:
        """How many have matrices: all but identities."""
        return self.n_experts - self.n_identities

    # --- parameters ---

    def _stored(self) -> list[tuple[Any, str]]:
        """Modules and names of the parameters: matrices, then biases."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        names = [first, "down_proj", *([f"{first}_bias", "down_proj_bias"] if self.has_bias else [])]
        return [(self.module, name) for name in names]

    def _parameters(self) -> list[Any]:
        """All that experts own, as it is stored."""
        return [
            StoredMatrices(holder, name, self.cut) if is_elsewhere(holder, name) else getattr(holder, name, None)
            for holder, name in self._stored()
        ]

    def matrices(self) -> list[tuple[nn.Module, str]]:
        """Modules and names of the parameters that are matrices."""
        return self._stored()[:2] if self.has_bias else self._stored()

    def first(self) -> list[tuple[Tensor | Matrices, Tensor | StoredMatrices | None]]:
        """Matrices and biases of the products with what experts read; their columns together make the neurons."""
        weight, bias = self._parameters()[0], self._parameters()[2] if self.has_bias else None
        return [(self._oriented(weight), bias)]

    def second(self) -> tuple[Tensor | Matrices, Tensor | StoredMatrices | None]:
        """Matrices and biases of the product that makes their output."""
        return self._oriented(self._parameters()[1]), self._parameters()[3] if self.has_bias else None

    def cut(self, weight: Tensor) -> Float[Tensor, "expert rows columns"]:
        """A stored parameter as one matrix for each expert."""
        return weight

    def _oriented(self, weight: Tensor | ReadableMatrices, transposed: bool | None = None) -> Tensor | Matrices:
        """Matrices [expert, in, out] of a parameter that is stored so (`transposed`) or the other way round."""
        transposed = self.transposed if transposed is None else transposed
        if not isinstance(weight, Tensor):
            return Matrices(weight, transposed, self.n_matrices)
        matrices = self.cut(weight)[: self.n_matrices]
        return matrices if transposed else matrices.mT

    def branch(self, number: int) -> Tensor | Matrices:
        """The matrices of the activated (0) or the linear (1) branch, which without a gate are the same."""
        matrices = [matrix for matrix, _ in self.first()]
        if not self.has_gate or len(matrices) == 2:
            return matrices[min(number, len(matrices) - 1)]
        whole = matrices[0]
        if isinstance(whole, Matrices):
            half = whole.shape[-1] // 2
            ends = slice(number, None, 2) if self.interleaved else slice(number * half, (number + 1) * half)
            return whole.narrowed(ends)
        return split_branches(whole, self.interleaved)[number]

    def sizes(self) -> tuple[int, int]:
        """Numbers in all experts' parameters, and in those of one expert that has any."""
        used = [*self.first(), self.second()]
        numbers = sum(part.numel() for pair in used for part in pair if part is not None)
        return sum(parameter.numel() for parameter in self._parameters()), numbers // self.n_matrices

    def holders(self) -> list[nn.Module]:
        """The modules that own the parameters."""
        return [self.module]

    @contextmanager
    def on_device(self) -> Generator[None]:
        """With their parameters where they compute: accelerate keeps those of offloaded layers elsewhere."""
        with ExitStack() as stack:
            for holder in self.holders():
                stack.enter_context(align_module_device(holder))
            yield

    # --- how they compute ---

    def sort(self, ids: Int[Tensor, "tokens top_k"]) -> tuple[Int[Tensor, " slots"], Int[Tensor, " slots"]]:
        """Ids of all slots by expert, and the slot of each: in the order in which transformers computes them.

        That order decides the last bits where a product is divided among threads, so it is transformers' own sort,
        which is not stable.
        """
        sorted_ids, slots = torch.sort(ids.flatten())
        return sorted_ids, slots

    def activate(self, projected: Float[Tensor, "rows width"], rows: Rows) -> Float[Tensor, "rows d_expert"]:  # noqa: ARG002
        """Neurons, of the products with what experts read."""
        return self.module._apply_gate(projected) if self.has_gate else self.module.act_fn(projected)

    def finish(self, out: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """What is done to an expert's output before it is weighted."""
        return self.module.post_expert_norm(out) if self.post_norm else out

    def product(self, x: Tensor, matrix: Tensor, rows: Rows) -> Tensor:
        """Each row times the matrix of its expert, as transformers computes it."""
        return grouped_product(x, matrix, rows)

    def total(
        self,
        weighted: Float[Tensor, "tokens top_k d_model"],
        indices: Int[Tensor, "tokens top_k"],  # noqa: ARG002
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens d_model"]:
        """The sum over slots, in `dtype`."""
        return weighted.sum(1).to(dtype)


def multiplied(x: Tensor, matrix: Tensor | Matrices, rows: Rows, product: Product, alone: bool) -> Tensor:
    """Each row times the matrix of its expert; of packed matrices those in use are unpacked, and not kept.

    On a processor, which multiplies one expert after the other anyway, each is unpacked just before (`alone`: where
    that changes no bit), so that it is still in the cache, and room is needed for one instead of all.
    """
    if isinstance(matrix, Tensor):
        return product(x, matrix, rows)
    used, of_used = rows.of_used()
    if not len(used):
        return x.new_zeros(0, matrix.shape[-1], dtype=matrix.dtype)

    def of(experts: Tensor, own: Rows, values: Tensor) -> Tensor:
        return packed_product(values, lambda: matrix.read(experts), lambda some, read: product(some, read, own))

    if not alone or x.device.type != "cpu":
        return of(used, of_used, x)
    return torch.cat([of(*one) for one in zip(used.split(1), of_used.apart(), x.split(of_used.counts()), strict=True)])


def grouped_product(x: Tensor, matrix: Tensor, rows: Rows) -> Tensor:
    """Each row times the matrix of its expert.

    `torch.nn.functional.grouped_mm` where it works; it refuses float64, rows that are not multiples of 16 bytes, and
    GPUs older than Ampere.
    """
    sizes = (matrix.shape[-2] * matrix.element_size(), matrix.shape[-1] * matrix.element_size())
    old = matrix.is_cuda and torch.cuda.get_device_capability(matrix.device) < (8, 0)
    if len(x) and matrix.dtype != torch.float64 and not old and not any(size % 16 for size in sizes):
        return F.grouped_mm(x.to(matrix.dtype), matrix, offs=rows.ends)
    return looped_product(x, matrix, rows)


def looped_product(x: Tensor, matrix: Tensor, rows: Rows) -> Tensor:
    """The same, one expert after the other."""
    # split, not slices: its backward is one concatenation instead of a full-size scatter for every expert
    return torch.cat(
        [part @ m for part, m in zip(x.to(matrix.dtype).split(rows.counts()), matrix.unbind(), strict=True)]
    )


def split_branches(projected: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The activated and the linear branch of a gated expert's first product."""
    if interleaved:
        return projected[..., ::2], projected[..., 1::2]
    activated, linear = projected.chunk(2, -1)
    return activated, linear


def join_branches(activated: Tensor, linear: Tensor, interleaved: bool) -> Tensor:
    """Inverse of `split_branches`."""
    if interleaved:
        return torch.stack([activated, linear], -1).flatten(-2)
    return torch.cat([activated, linear], -1)


def top_k_of(moe: Any, router: Any, config: Any, field: str) -> int:
    """Experts of a token, as router, block or a field of the config says."""
    for owner in (router, moe):
        if hasattr(owner, "top_k"):
            return int(owner.top_k)
    return int(getattr(config, field))
