"""What stands around the core: commands that call load_pipeline() and optimize() as scripts do."""
