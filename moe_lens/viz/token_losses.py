"""What each token of a text was worth to several versions of a model, or to several lenses, side by side."""

import html
import math
from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from moe_lens.errors import InputError, several
from moe_lens.viz.token_text import readable
from moe_lens.viz.tokens_html import TokensHTML


def token_log_probs(tokens: Sequence[str], versions: Mapping[str, Float[Tensor, " pos"]]) -> TokensHTML:
    """Log-probability of each token given those before it, a column for each version; and the differences to the first.

    Args:
        tokens: The texts of the tokens.
        versions: By name, in nats, [pos], NaN where nothing was predicted, as at the first token: of a model and of the
            same model with `ablate`, or of a lens at several layers (`-result.cross_entropy[layer, sum, 0]`, which
            stands at the token that was read from, so shift it by one). A cell is coloured by its log-probability, or
            by the difference: red is less likely, blue more.

    Raises:
        InputError: One text instead of tokens, no version, values of another text, or values above 0, such as losses.
    """
    tokens = several(tokens, "tokens")
    columns = {name: values.detach().cpu().double() for name, values in versions.items()}
    if not columns:
        raise InputError("got no version; expected log-probabilities by name")
    for name, values in columns.items():
        if tuple(values.shape) != (len(tokens),):
            raise InputError(
                f"{name}: log-probabilities of shape {tuple(values.shape)}, and {len(tokens)} tokens; expected one each"
            )
        if (values > 0.01).any():  # and no rounding of a probability of 1
            raise InputError(
                f"{name} holds {values.nan_to_num(-math.inf).max():.3g}; expected log-probabilities, which are 0 at "
                "most: of losses, their negatives"
            )
    first, *others = columns
    shown = {name: (values.tolist(), _surprise) for name, values in columns.items()}
    shown |= {f"{name} − {first}": ((columns[name] - columns[first]).tolist(), _change) for name in others}
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("token", *shown))
    rows = [
        f'<tr><th scope="row" style="text-align:left;font-family:monospace">{html.escape(readable(token))}</th>'
        + "".join(_cell(values[at], shade) for values, shade in shown.values())
        + "</tr>"
        for at, token in enumerate(tokens)
    ]
    means = "".join(_cell(_mean(values), None) for values, _ in shown.values())
    rows.append(f'<tr><th scope="row" style="text-align:left">mean</th>{means}</tr>')
    return TokensHTML(
        '<table class="token-log-probs" style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        f"<caption>log-probability, nats</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _cell(value: float, shade: Callable[[float], str] | None) -> str:
    if math.isnan(value):
        return "<td></td>"
    look = "text-align:right;padding:1px 8px;"
    if shade is not None:
        look += f"color:#10212e;background:{shade(value)}"
    return f'<td style="{look}">{value:.3f}</td>'


def _surprise(value: float) -> str:
    """White where a token was certain, darker the less likely it was."""
    return _on_white((107, 174, 214), min(1.0, -value / 12))


def _change(value: float) -> str:
    return _on_white((107, 174, 214) if value > 0 else (224, 138, 134), min(1.0, abs(value) / 3))


def _on_white(colour: tuple[int, int, int], strength: float) -> str:
    """Opaque: the ink is dark, and what lies behind may be dark too."""
    red, green, blue = (round(255 + (part - 255) * strength) for part in colour)
    return f"rgb({red},{green},{blue})"
