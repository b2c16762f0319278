"""Models that learn from other models: smaller ones (`bksdm`, `pruning`), and ones that need fewer steps (`flash`)."""
