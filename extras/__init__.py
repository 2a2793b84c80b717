"""What stands around the core: each command calls load_pipeline() and optimize() as the scripts do."""
