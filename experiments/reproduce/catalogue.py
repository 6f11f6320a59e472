"""All tables by name."""

from __future__ import annotations

from experiments.reproduce import dgkd, takd, teskd
from experiments.reproduce.tables import Table

TABLES: dict[str, Table] = {
    table.name: table for table in (*takd.TABLES, *dgkd.TABLES, *teskd.TABLES)
}
