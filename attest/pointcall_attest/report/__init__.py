"""Reports over a log, for auditors and for the people on call: a typed value, a page, and JSON beside it.

Stable: `build`, `Known`, `Report`, `render_html`. The control mapping is data (controls.toml); everything else is
inside this room. Spec: docs/spec/report.md.
"""

from pointcall_attest.report.build import Known, build
from pointcall_attest.report.model import Report
from pointcall_attest.report.page import render_html

__all__ = ["Known", "Report", "build", "render_html"]
