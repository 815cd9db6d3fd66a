"""What packing in 4 and 8 bits does to the embedded model: size, loss, which experts are chosen, and which matter.

Run `python benchmarks/quantisation.py`; needs `pip install 'moe-lens[quant]'`. Loss is the mean over some texts of each
shipped domain, cut to TOKENS tokens; the share is that of (token, layer) slots whose expert was chosen unpacked too.
Spearman's correlation is that of what taking out each of EXPERTS random experts adds to the loss of a part of the texts
(KNOCKED of each domain), with what it adds in float32.
"""

import warnings
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from moe_lens import HookedMoE
from moe_lens.data import embedded_domains
from moe_lens.model.loading.quantising import packed_in

TEXTS, TOKENS = 12, 128
EXPERTS, KNOCKED = 40, 3


def loss_of(model: HookedMoE, tokens: torch.Tensor) -> float:
    """Mean loss in nats a token, in float32 whatever the logits are in."""
    return float(cross_entropy(model(tokens)[0, :-1].float(), tokens[0, 1:]))


@torch.no_grad()
def measured(model: HookedMoE, texts: list[str]) -> tuple[float, torch.Tensor]:
    """Mean loss in nats a token, and the chosen experts of all tokens."""
    losses, chosen = [], []
    for text in texts:
        tokens = model.to_tokens(text)[:, :TOKENS]
        routing = model.routing(tokens)
        losses.append(loss_of(model, tokens))
        chosen.append(routing.indices[:, 0].transpose(0, 1))
    return sum(losses) / len(losses), torch.cat(chosen)


@torch.no_grad()
def knocked_out(model: HookedMoE, texts: list[str]) -> torch.Tensor:
    """What taking out each of some experts adds to the mean loss, in nats a token."""
    several = [model.to_tokens(text)[:, :TOKENS] for text in texts]

    def loss() -> float:
        return sum(loss_of(model, tokens) for tokens in several) / len(several)

    drawn = torch.randperm(len(model.moe_layers) * model.n_experts, generator=torch.Generator().manual_seed(0))
    whole, effects = loss(), list[float]()
    for number in drawn[:EXPERTS].tolist():
        row, expert = divmod(number, model.n_experts)
        with model.ablate({model.moe_layers[row]: [expert]}, how="zero"):
            effects.append(loss() - whole)
    return torch.tensor(effects, dtype=torch.float64)


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Correlation of ranks; no two values are equal."""
    return float(torch.corrcoef(torch.stack([values.argsort().argsort().double() for values in (one, other)]))[0, 1])


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    domains = [[str(passage.text) for passage in domain.passages[:TEXTS]] for domain in embedded_domains()]
    texts, some = [text for domain in domains for text in domain], [t for domain in domains for t in domain[:KNOCKED]]
    exact = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    (loss, experts), effects = measured(exact, texts), knocked_out(exact, some)
    size = sum(p.nbytes for p in exact.original_model.parameters())
    print(f"{'float32':8}  {size / 1e6:6.1f} MB  loss {loss:.4f}")
    for name in ("bfloat16", "int8", "nf4", "fp4"):
        how: dict[str, Any] = (
            {"dtype": torch.bfloat16} if name == "bfloat16" else {"dtype": torch.float32, "quantize": name}
        )
        model = HookedMoE.from_pretrained("tiny-deepseekmoe", **how)
        size = sum(part.nbytes for part in (*model.original_model.parameters(), *(p for _, p in packed_in(model))))
        other, found = measured(model, texts)
        same = (found[..., :, None] == experts[..., None, :]).any(-1).double().mean()
        ranks = spearman(knocked_out(model, some), effects)
        print(
            f"{name:8}  {size / 1e6:6.1f} MB  loss {other:.4f} ({other - loss:+.4f})  same experts {float(same):.1%}  "
            f"knock-outs' ranks {ranks:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
