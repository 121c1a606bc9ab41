"""What `bridge.verify()` is made of: evidence, checks on values, checks on runs, and the report."""
