"""Verbs that only read a study: failures, table, compare, atlas, watch."""
