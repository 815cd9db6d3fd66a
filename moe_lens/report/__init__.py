"""Results → one self-contained HTML page, and its numbers as JSON and parquet."""

from moe_lens.report.report_files import OutputFolder as OutputFolder
from moe_lens.report.report_files import write as write
from moe_lens.report.run_report import Report as Report
from moe_lens.report.run_report import ReportSettings as ReportSettings
from moe_lens.report.run_report import n_steps as n_steps
from moe_lens.report.run_report import report_batches as report_batches
from moe_lens.report.run_report import run as run
from moe_lens.report.study_page import write_saved as write_saved
