"""Verbs that read what studies have measured: failures, table, compare, atlas, watch."""
