"""The parts of `qshard-prep` and of the converters beside it: errors, records, templates, tokens, files."""
