"""Everything that is put on a live model, beside what takes it off again."""
