"""Studies of a model in one folder, and one self-contained HTML page of them."""

from moe_lens import checked as _checked
from moe_lens.report.report_files import OutputFolder as OutputFolder
from moe_lens.report.report_page import write_page as write_page
from moe_lens.report.run_report import READING as READING
from moe_lens.report.run_report import STUDIES as STUDIES
from moe_lens.report.run_report import run as run

_checked.what_is_offered(__name__)
