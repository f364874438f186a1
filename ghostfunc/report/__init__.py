"""One HTML page of scores and samples that needs nothing else.

write_report("page.html", scores, Rows.open("pool.jsonl"))
"""

from ghostfunc.report._page import Heat, Timeline, write_report

__all__ = ["Heat", "Timeline", "write_report"]
