"""utils/tables.py: the columns of Markdown tables are aligned."""

from utils.tables import markdown_table


def test_markdown_table_aligns_its_columns():
    table = markdown_table([["", "a long header"], ["row", "1"]])
    assert table.splitlines() == [
        "|     | a long header |",
        "|-----|---------------|",
        "| row | 1             |",
    ]
