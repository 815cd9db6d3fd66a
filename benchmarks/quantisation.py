"""What packing in 4 and 8 bits does to the embedded model: size, loss, and which experts are chosen.

Run `python benchmarks/quantisation.py`; needs `pip install 'moe-lens[quant]'`. Loss is the mean over some texts of each
shipped domain, cut to TOKENS tokens; the share is that of (token, layer) slots whose expert was chosen unpacked too.
"""

from typing import Any

import torch

from moe_lens import HookedMoE
from moe_lens.data import embedded_domains
from moe_lens.model.loading.quantising import packed_in

TEXTS, TOKENS = 12, 128


@torch.no_grad()
def measured(model: HookedMoE, texts: list[str]) -> tuple[float, torch.Tensor]:
    """Mean loss in nats a token, and the chosen experts of all tokens."""
    losses, chosen = [], []
    for text in texts:
        tokens = model.to_tokens(text)[:, :TOKENS]
        routing = model.routing(tokens)
        losses.append(float(model(tokens, return_type="loss")))
        chosen.append(routing.indices[:, 0].transpose(0, 1))
    return sum(losses) / len(losses), torch.cat(chosen)


def main() -> None:
    """Print the table."""
    texts = [str(passage.text) for domain in embedded_domains() for passage in domain.passages[:TEXTS]]
    exact = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    loss, experts = measured(exact, texts)
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
        print(f"{name:8}  {size / 1e6:6.1f} MB  loss {other:.4f} ({other - loss:+.4f})  same experts {float(same):.1%}")


if __name__ == "__main__":
    main()
