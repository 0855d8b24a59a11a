"""The report of a family run: several models under several policies on one page, in one table, in one CSV file."""

from rwkvq.report.family.data import CellData, FamilyData
from rwkvq.report.family.export import family_csv, family_metrics
from rwkvq.report.family.html import render
from rwkvq.report.family.markdown import family_markdown
from rwkvq.report.family.tables import family_table

__all__ = ["CellData", "FamilyData", "family_csv", "family_markdown", "family_metrics", "family_table", "render"]
