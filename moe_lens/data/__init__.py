"""Domains of text, and the token batches made from them."""

import typing

from moe_lens import _late
from moe_lens import checked as _checked
from moe_lens._moved import renamed
from moe_lens.data.as_domains import Domains as Domains
from moe_lens.data.as_domains import as_domains as as_domains
from moe_lens.data.as_domains import in_memory as in_memory
from moe_lens.data.corpus import Corpus as Corpus
from moe_lens.data.corpus import from_file as from_file
from moe_lens.data.corpus import from_generator as from_generator
from moe_lens.data.corpus import from_hub as from_hub
from moe_lens.data.domain_specs import DomainSpec as DomainSpec
from moe_lens.data.domain_specs import domains_from_table as domains_from_table
from moe_lens.data.domain_specs import parse_domains as parse_domains
from moe_lens.data.domains import EMBEDDED as EMBEDDED
from moe_lens.data.domains import Domain as Domain
from moe_lens.data.domains import embedded_domain as embedded_domain
from moe_lens.data.domains import embedded_domains as embedded_domains
from moe_lens.data.domains import load_domain as load_domain
from moe_lens.data.paper_presets import PRESETS as PRESETS
from moe_lens.data.paper_presets import Preset as Preset
from moe_lens.data.rows import Passage as Passage
from moe_lens.data.shards import Reading as Reading
from moe_lens.data.shards import Shard as Shard
from moe_lens.data.shards import shards as shards
from moe_lens.data.windows import Window as Window

if typing.TYPE_CHECKING:
    from moe_lens.data.token_batches import TokenBatch as TokenBatch
    from moe_lens.data.token_batches import Tokens as Tokens
    from moe_lens.data.token_batches import batch_windows as batch_windows
    from moe_lens.data.token_batches import tokenize as tokenize
else:  # domains are read without torch
    _look_up, __dir__ = _late.resolved_late(
        __name__, {"moe_lens.data.token_batches": ["TokenBatch", "Tokens", "batch_windows", "tokenize"]}
    )
    __getattr__ = renamed(__name__, {"batched": "batch_windows"}, _look_up)

_checked.what_is_offered(__name__)
