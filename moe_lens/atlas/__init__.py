"""The atlas: a folder of pages, one for every expert, that opens from the disk and asks for nothing."""

from moe_lens import checked as _checked
from moe_lens.atlas.atlas_folder import AtlasFolder as AtlasFolder
from moe_lens.atlas.card import ExpertCard as ExpertCard
from moe_lens.atlas.card import expert_card as expert_card
from moe_lens.atlas.pages import write_atlas as write_atlas
from moe_lens.atlas.run_atlas import READING as READING
from moe_lens.atlas.run_atlas import run as run

_checked.what_is_offered(__name__)
