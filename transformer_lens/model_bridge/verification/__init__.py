"""The parts of `bridge.verify()`: evidence, checks on values, checks on runs, and the report."""
