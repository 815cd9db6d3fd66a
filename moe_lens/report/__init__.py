"""Results → one self-contained HTML page, and its numbers as JSON and parquet."""

from moe_lens.report.collect import Report as Report
from moe_lens.report.collect import Settings as Settings
from moe_lens.report.collect import batched as batched
from moe_lens.report.collect import n_steps as n_steps
from moe_lens.report.collect import run as run
from moe_lens.report.files import OutputFolder as OutputFolder
from moe_lens.report.files import write as write
from moe_lens.report.saved import write_saved as write_saved
