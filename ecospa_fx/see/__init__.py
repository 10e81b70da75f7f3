"""See: findings, tables, graphs and reports that people read."""
