"""See: the findings of a model as explanations, tables, graphs, reports and warnings for people."""
