"""Domains of text, and the token batches made from them."""

from moe_lens.data.batches import TokenBatch as TokenBatch
from moe_lens.data.batches import Tokens as Tokens
from moe_lens.data.batches import tokenize as tokenize
from moe_lens.data.domains import Domain as Domain
from moe_lens.data.domains import Passage as Passage
from moe_lens.data.domains import embedded_domains as embedded_domains
from moe_lens.data.domains import load_domain as load_domain
